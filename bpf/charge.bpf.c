// SPDX-License-Identifier: GPL-2.0
/*
 * Runs at each charge of a batch of pages (64 as a rule) to a memcg and its ancestors, before the pages are
 * counted, and tells the reader when a watched one crosses a level.
 *
 * The charge goes to a page_counter; &memcg->memory is one, and the counters' parents are the ancestors'.
 * unreclaimable = usage - file LRU is exact only for a memcg without children: LRU sizes are per memcg, usage is
 * hierarchical. So the smaller of two upper bounds is used: that one, and what memory.stat last said plus all that
 * was charged since.
 *
 * All offsets and sizes (OFF_*, NUM_*) come from the running kernel's BTF; see governor/btf.py.
 */
#include "kernel.h"

#define MAX_DEPTH 10 /* /kubepods.slice/.../pod.slice/x.scope/agent/tool is 7 */
#define MAX_WATCHED 4096
#define RATE_UNKNOWN (~0ULL)
#define TREND_NS 250000000ULL
#define BATCH_PAGES 64 /* MEMCG_CHARGE_BATCH */
#define STOCK_PAGES 32
#define OWN_COARSE_SHIFT 11 /* the LRU sizes are read again once 1/2048 of max is charged */
#define LRU_INACTIVE_FILE 2
#define LRU_ACTIVE_FILE 3
#define LRUGEN_TYPES 2 /* anon, file */
#define LRUGEN_FILE 1

/* The file sizes of one node's lists, classic and multi-generational; too large for the 512 bytes of stack. */
struct lru_sizes {
	u64 classic[NUM_ZONES * NUM_LRU_LISTS];
	u64 generations[NUM_GENERATIONS * LRUGEN_TYPES * NUM_ZONES];
};

/* Pages that this CPU may charge to a full memcg unseen: they were counted beforehand. */
struct stock {
	u64 counter;
	u64 pages;
};

BPF_ARRAY(config, struct config, 1);
BPF_HASH(watch, u64, struct watch, MAX_WATCHED);
BPF_HASH(track, u64, struct track, MAX_WATCHED);
BPF_PERCPU_ARRAY(lru_scratch, struct lru_sizes, 1);
BPF_PERCPU_ARRAY(stocks, struct stock, 1);
BPF_PERCPU_ARRAY(dropped, u64, 1);
BPF_RINGBUF_OUTPUT(ring, 64);

/* Swap, TCP and hugetlb have page_counters of their own: is this address truly a memcg's `memory`? */
static __always_inline int is_memcg(u64 memcg)
{
	u64 cgroup = read_u64(memcg + OFF_MEMCG_CGROUP);

	return read_u64(cgroup + OFF_CGROUP_SUBSYS + MEMORY_CGRP_ID * sizeof(u64)) == memcg;
}

static __always_inline u64 file_lru_pages(u64 memcg)
{
	struct lru_sizes *sizes;
	u32 zero = 0;
	s64 pages = 0;

	sizes = lru_scratch.lookup(&zero);
	if (!sizes)
		return 0;
	for (int node = 0; node < NUM_NODES; node++) {
		u64 info = read_u64(memcg + OFF_MEMCG_NODEINFO + node * sizeof(u64));

		if (!info)
			continue;
		bpf_probe_read_kernel(sizes->classic, sizeof(sizes->classic), (void *)(info + OFF_NODE_LRU_ZONE_SIZE));
		for (int zone = 0; zone < NUM_ZONES; zone++)
			pages += sizes->classic[zone * NUM_LRU_LISTS + LRU_INACTIVE_FILE] +
				 sizes->classic[zone * NUM_LRU_LISTS + LRU_ACTIVE_FILE];
#if NUM_GENERATIONS > 0
		bpf_probe_read_kernel(sizes->generations, sizeof(sizes->generations),
				      (void *)(info + OFF_NODE_LRUGEN_PAGES));
		for (int generation = 0; generation < NUM_GENERATIONS; generation++)
			for (int zone = 0; zone < NUM_ZONES; zone++)
				pages += sizes->generations[(generation * LRUGEN_TYPES + LRUGEN_FILE) *
								    NUM_ZONES +
							    zone];
#endif
	}
	return pages > 0 ? pages : 0;
}

static __always_inline u32 level_of(const struct watch *w, u64 ppm, u32 before)
{
	u32 level = 0;

	for (int i = 0; i < LEVELS; i++)
		if (ppm >= w->engage_ppm[i] || (i < before && ppm >= w->release_ppm[i]))
			level = i + 1;
	return level;
}

/* Pages per second by which the bound has grown, over the window that began rate_window_ns ago or earlier. */
static __always_inline u64 fill_rate(struct track *t, u64 now, u64 bound, u64 window_ns)
{
	u64 elapsed = now > t->window_ns ? now - t->window_ns : 0; /* another CPU may be ahead */
	u64 grown = bound > t->window_pages ? bound - t->window_pages : 0;
	u64 rate = t->rate_pages;

	if (!t->window_ns) {
		t->window_ns = now;
		t->window_pages = bound;
		t->rate_pages = RATE_UNKNOWN;
		return RATE_UNKNOWN;
	}
	if (elapsed >= window_ns / 4)
		rate = grown * 1000000ULL / (elapsed / 1000 + 1);
	if (elapsed >= window_ns) {
		t->window_ns = now;
		t->window_pages = bound;
		t->rate_pages = rate;
	}
	return rate;
}

/*
 * Pages per second over the last TREND_NS to 2 * TREND_NS, or since the levels were set anew if that is later:
 * after a thaw only what came since counts.
 */
static __always_inline u64 trend(struct track *t, u64 now, u64 bound)
{
	u64 elapsed;

	if (!t->trend_ns) {
		t->trend_ns = t->trend_next_ns = now;
		t->trend_pages = t->trend_next_pages = bound;
		return RATE_UNKNOWN;
	}
	if (bound < t->trend_pages)
		t->trend_pages = bound;
	if (bound < t->trend_next_pages)
		t->trend_next_pages = bound;
	if ((s64)(now - t->trend_next_ns) >= (s64)TREND_NS) { /* another CPU may be ahead */
		t->trend_ns = now - t->trend_next_ns > 2 * TREND_NS ? now - 2 * TREND_NS : t->trend_next_ns;
		t->trend_pages = t->trend_next_pages;
		t->trend_next_ns = now;
		t->trend_next_pages = bound;
	}
	elapsed = now - t->trend_ns;
	if ((s64)elapsed < 1000000)
		elapsed = 1000000;
	return bound > t->trend_pages ? (bound - t->trend_pages) * 1000000ULL / (elapsed / 1000) : 0;
}

/*
 * usage - file LRU. A memcg full of page cache is charged page by page: between two reads of the lists everything
 * charged counts as unreclaimable, which errs upwards, and by 1/2048 of max at most.
 */
static __always_inline u64 own_pages(struct track *t, u64 memcg, u64 usage, u64 charged, u64 max)
{
	u32 since = (u32)charged - (u32)t->own;
	u64 file;

	if (t->own && since < max >> OWN_COARSE_SHIFT)
		return (t->own >> 32) + since;
	file = file_lru_pages(memcg);
	usage = usage > file ? usage - file : 0;
	t->own = usage << 32 | (u32)charged;
	return usage;
}

static __always_inline void look(u64 counter, u64 memcg, u64 id, const struct watch *w, struct track *t,
				 u64 nr_pages, u64 counted, u64 now, u64 window_ns)
{
	u64 usage = read_u64(counter + OFF_COUNTER_USAGE) + nr_pages;
	u64 max = read_u64(counter + OFF_COUNTER_MAX);
	u64 charged = t->charged_pages, since, bound = usage, rate, slope, ppm;
	u64 time_to_max = ~0ULL;
	u32 level, kind = 0, flags = 0, zero = 0;
	struct record *r;

	if (usage <= max) { /* otherwise it is refused, and tried again after reclaim */
		lock_xadd(&t->charged_pages, counted);
		charged += counted;
	}
	if (w->max_pages && w->max_pages < max)
		max = w->max_pages;
	if (!max)
		return;
	if (t->epoch != w->epoch) {
		t->epoch = w->epoch;
		t->level = 0;
		t->near = 0;
		t->trend_ns = 0;
		t->own = 0;
	}
	if (!t->level && usage * PPM < max * w->release_ppm[0])
		return; /* the bound is lower still */

	since = charged - w->verified_at_pages;
	if (w->verify_after_pages && w->verified_pages + since < bound)
		bound = w->verified_pages + since;
	if (bound * PPM >= max * w->release_ppm[0]) {
		u64 own = own_pages(t, memcg, usage, charged, max);

		if (own < bound)
			bound = own;
	}
	rate = fill_rate(t, now, bound, window_ns);
	slope = trend(t, now, bound);
	if (rate && rate != RATE_UNKNOWN)
		time_to_max = bound < max ? (max - bound) * 1000000ULL / rate * 1000ULL : 0;
	ppm = bound * PPM / max;
	level = level_of(w, ppm, t->level);

	if (level != t->level) {
		kind = CROSSING;
		flags = level > t->level ? RISING : 0;
		t->level = level;
	}
	if (ppm >= w->horizon_floor_ppm && time_to_max < w->horizon_ns) {
		if (!t->near) {
			t->near = 1;
			kind = CROSSING;
			flags = RISING;
		}
		flags |= HORIZON;
	} else if (t->near && time_to_max > 2 * w->horizon_ns) {
		t->near = 0;
	}
	if (!kind && w->verify_after_pages && since >= w->verify_after_pages &&
	    t->verify_asked != w->verified_at_pages + 1) {
		t->verify_asked = w->verified_at_pages + 1;
		kind = VERIFY;
	}
	if (!kind)
		return;

	r = ring.ringbuf_reserve(sizeof(*r));
	if (!r) {
		u64 *count = dropped.lookup(&zero);

		if (count)
			(*count)++;
		return;
	}
	begin_record(r, kind, id, bpf_ktime_get_ns());
	r->flags = flags;
	r->valid = HAS_MEMORY | (rate != RATE_UNKNOWN ? HAS_RATE : 0) | (slope != RATE_UNKNOWN ? HAS_TREND : 0);
	r->level = level;
	r->usage_pages = usage;
	r->bound_pages = bound;
	r->max_pages = max;
	r->charged_pages = charged;
	r->fill_rate_pages = rate;
	r->time_to_max_ns = time_to_max;
	r->stall_ns = t->stall_ns;
	r->trend_pages = slope;
	ring.ringbuf_submit(r, 0);
}

/*
 * How many pages to count for a charge; 0: it need not be looked at. A memcg at its limit (full of page cache, as a
 * rule) is charged page by page, each after a batch was refused: of those only every 32nd is looked at.
 */
static __always_inline u64 pages_to_count(u64 counter, u64 nr_pages)
{
	u64 usage = read_u64(counter + OFF_COUNTER_USAGE), max = read_u64(counter + OFF_COUNTER_MAX);
	struct stock *s;
	u32 zero = 0;

	if (usage + nr_pages > max)
		return 0; /* refused, and tried again after reclaim */
	if (usage + BATCH_PAGES <= max || nr_pages >= STOCK_PAGES)
		return nr_pages;
	s = stocks.lookup(&zero);
	if (!s)
		return nr_pages;
	if (s->counter == counter && s->pages >= nr_pages) {
		s->pages -= nr_pages;
		return 0;
	}
	s->counter = counter;
	s->pages = STOCK_PAGES - nr_pages;
	return STOCK_PAGES;
}

static __always_inline void on_charge(u64 counter, u64 nr_pages)
{
	u64 counted = pages_to_count(counter, nr_pages), now;
	struct config *c;
	u32 zero = 0;

	if (!counted)
		return;
	now = bpf_ktime_get_ns();
	c = config.lookup(&zero);
	if (!c || !is_read(c, now))
		return;
	for (int depth = 0; depth < MAX_DEPTH && counter; depth++) {
		u64 memcg = counter - OFF_MEMCG_MEMORY;
		u64 id = cgroup_id_of(memcg);
		struct watch *w = watch.lookup(&id);
		struct track *t = w ? track.lookup(&id) : NULL;

		if (w && t && is_memcg(memcg))
			look(counter, memcg, id, w, t, nr_pages, counted, now, c->rate_window_ns);
		counter = read_u64(counter + OFF_COUNTER_PARENT);
	}
}

#ifdef USE_KPROBE
#include <uapi/linux/ptrace.h>
int on_charge_kprobe(struct pt_regs *ctx)
{
	on_charge(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
	return 0;
}
#else
struct page_counter; /* only its address is used */
KFUNC_PROBE(page_counter_try_charge, struct page_counter *counter, unsigned long nr_pages)
{
	on_charge((u64)counter, nr_pages);
	return 0;
}
#endif
