// SPDX-License-Identifier: GPL-2.0
/*
 * Tells the reader whom the kernel's OOM killer chose, and for which memcg. A module of its own: governor works
 * without it. Offsets (OFF_*) come from the running kernel's BTF; see governor/btf.py.
 */
#include "kernel.h"

BPF_ARRAY(config, struct config, 1);
BPF_PERCPU_ARRAY(dropped, u64, 1);
BPF_RINGBUF_OUTPUT(ring, 8);

struct oom_control; /* only its address is used */
KFUNC_PROBE(oom_kill_process, struct oom_control *oc)
{
	u64 now = bpf_ktime_get_ns(), memcg, victim;
	struct record *r;
	struct config *c;
	u32 zero = 0;

	c = config.lookup(&zero);
	if (!c || !is_read(c, now))
		return 0;
	r = ring.ringbuf_reserve(sizeof(*r));
	if (!r) {
		u64 *count = dropped.lookup(&zero);

		if (count)
			(*count)++;
		return 0;
	}
	memcg = read_u64((u64)oc + OFF_OOM_MEMCG);
	victim = read_u64((u64)oc + OFF_OOM_CHOSEN);
	begin_record(r, OOM_KILL, memcg ? cgroup_id_of(memcg) : 0, now);
	bpf_probe_read_kernel(&r->pid, sizeof(r->pid), (void *)(victim + OFF_TASK_TGID));
	bpf_probe_read_kernel(&r->tid, sizeof(r->tid), (void *)(victim + OFF_TASK_PID));
	ring.ringbuf_submit(r, 0);
	return 0;
}
