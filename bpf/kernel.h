/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Reading kernel memory by address, and what every module does with a record. Only functions that touch no map
 * stand here: BCC rewrites map calls in the main file alone. OFF_* come from the kernel's BTF (governor/btf.py).
 */
#ifndef GOVERNOR_KERNEL_H
#define GOVERNOR_KERNEL_H

#include "record.h"

static __always_inline u64 read_u64(u64 address)
{
	u64 value = 0;

	bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/* cgroup v2 id of a memcg: css.cgroup->kn->id, the inode number of its directory. */
static __always_inline u64 cgroup_id_of(u64 memcg)
{
	return read_u64(read_u64(read_u64(memcg + OFF_MEMCG_CGROUP) + OFF_CGROUP_KN) + OFF_KN_ID);
}

/* Is anybody reading? If not, there is nothing to do. */
static __always_inline int is_read(const struct config *c, u64 now)
{
	return c->enabled && now - c->heartbeat_ns <= c->idle_after_ns;
}

static __always_inline void begin_record(struct record *r, u32 kind, u64 cgroup_id, u64 now)
{
	u64 pid_tgid = bpf_get_current_pid_tgid();

	__builtin_memset(r, 0, sizeof(*r));
	r->kind = kind;
	r->cgroup_id = cgroup_id;
	r->ktime_ns = now;
	r->pid = pid_tgid >> 32;
	r->tid = pid_tgid;
}

#endif
