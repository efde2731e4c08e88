// SPDX-License-Identifier: GPL-2.0
/*
 * Sums the time that threads spend in memory stalls (the kernel's PSI sections) per watched memcg and its
 * ancestors, and tells the reader when a window of stall_window_ns holds more than asked. A module of its own:
 * governor works without it.
 */
#include "kernel.h"

#define MAX_DEPTH 10
#define MAX_WATCHED 4096
#define MAX_STALLED 16384

BPF_ARRAY(config, struct config, 1);
BPF_HASH(watch, u64, struct watch, MAX_WATCHED);
BPF_HASH(track, u64, struct track, MAX_WATCHED);
BPF_TABLE("lru_hash", u32, u64, entered, MAX_STALLED);
BPF_PERCPU_ARRAY(dropped, u64, 1);
BPF_RINGBUF_OUTPUT(ring, 8);

static __always_inline void account(u64 id, const struct watch *w, struct track *t, u64 now, u64 stalled_ns,
				    u64 window_ns)
{
	u32 zero = 0, over;
	struct record *r;

	lock_xadd(&t->stall_ns, stalled_ns);
	if (!w->stall_engage_ns)
		return;
	if (now - t->stall_window_start_ns > window_ns) {
		if (now - t->stall_window_start_ns > 2 * window_ns)
			t->stalled = 0; /* a whole window without a stall */
		t->stall_window_start_ns = now;
		t->stall_in_window_ns = 0;
	}
	t->stall_in_window_ns += stalled_ns;
	over = t->stall_in_window_ns >= w->stall_engage_ns;
	if (!over || t->stalled)
		return;
	t->stalled = 1;
	r = ring.ringbuf_reserve(sizeof(*r));
	if (!r) {
		u64 *count = dropped.lookup(&zero);

		if (count)
			(*count)++;
		return;
	}
	begin_record(r, STALL, id, now);
	r->flags = RISING;
	r->valid = HAS_STALL;
	r->stall_ns = t->stall_ns;
	ring.ringbuf_submit(r, 0);
}

KFUNC_PROBE(psi_memstall_enter, unsigned long *flags)
{
	u64 now = bpf_ktime_get_ns();
	u32 tid = bpf_get_current_pid_tgid(), zero = 0;
	struct config *c = config.lookup(&zero);

	if (!c || !is_read(c, now))
		return 0;
	entered.insert(&tid, &now); /* keeps the outermost: stalls nest */
	return 0;
}

KFUNC_PROBE(psi_memstall_leave, unsigned long *flags)
{
	u64 now = bpf_ktime_get_ns(), *since, stalled_ns;
	u32 tid = bpf_get_current_pid_tgid(), zero = 0;
	unsigned long nested = 0;
	struct config *c;

	since = entered.lookup(&tid);
	c = config.lookup(&zero);
	bpf_probe_read_kernel(&nested, sizeof(nested), flags);
	if (!since || !c || nested)
		return 0;
	stalled_ns = now - *since;
	entered.delete(&tid);
	for (int depth = 1; depth < MAX_DEPTH; depth++) {
		u64 id = bpf_get_current_ancestor_cgroup_id(depth);
		struct watch *w = id ? watch.lookup(&id) : NULL;
		struct track *t = w ? track.lookup(&id) : NULL;

		if (w && t)
			account(id, w, t, now, stalled_ns, c->stall_window_ns);
		if (!id)
			break;
	}
	return 0;
}
