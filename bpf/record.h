/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the BPF programs and governor/record.py share: the record that goes through the rings and the values of
 * the maps. Flat structs of u32 and u64 without holes; BCC knows no __u64, so the short names are used. A unit
 * test compiles this file and compares every offset with record.py.
 */
#ifndef GOVERNOR_RECORD_H
#define GOVERNOR_RECORD_H

#ifdef GOVERNOR_HOST_TYPES
#include <stdint.h>
typedef uint32_t u32;
typedef uint64_t u64;
#endif

#define LEVELS 4 /* compact, arm, brake, last: record.py names them */
#define PPM 1000000ULL

enum record_kind {
	CROSSING = 1, /* a level was crossed, or max is near in time */
	VERIFY = 2, /* so much was charged since memory.stat was read that it wants to be read again */
	STALL = 3, /* the tasks of a memcg stalled on memory for longer than asked within a window */
	OOM_KILL = 4, /* the kernel chose a victim */
};

enum record_flag {
	RISING = 1, /* clear: falling */
	HORIZON = 2, /* time to max is under the horizon */
};

/* Which groups of a record hold something; a clear bit means "read the file", not zero. */
enum record_valid {
	HAS_MEMORY = 1, /* usage, bound, max, charged */
	HAS_RATE = 2, /* fill rate, time to max */
	HAS_STALL = 4,
	HAS_TREND = 8,
};

struct record {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u64 cgroup_id; /* the watched memcg; 0: the whole machine (OOM_KILL) */
	u32 kind;
	u32 flags;
	u32 valid;
	u32 level; /* 0: below all levels */
	u32 pid; /* who charged, stalled, or was chosen */
	u32 tid;
	u64 usage_pages;
	u64 bound_pages; /* upper bound of what is unreclaimable; exact for a memcg without children or slab */
	u64 max_pages;
	u64 charged_pages; /* ever charged, since the memcg is tracked; wraps never, uncharges do not count */
	u64 fill_rate_pages; /* per second */
	u64 time_to_max_ns;
	u64 stall_ns; /* of all threads, since the memcg is tracked */
	u64 trend_pages; /* per second as well, over a quarter to half a second: growth in steps looks fast up close */
};

/* config[0]: one per module. */
struct config {
	u64 heartbeat_ns; /* CLOCK_MONOTONIC of the reader's last sign of life */
	u64 idle_after_ns; /* heartbeat older than this: do nothing */
	u64 rate_window_ns; /* the fill rate is taken over at least this long */
	u64 stall_window_ns;
	u64 enabled; /* 0: do nothing */
};

/* watch[cgroup id]: written by the reader only. */
struct watch {
	u64 max_pages; /* 0: the memcg's own memory.max, read at each charge */
	u64 engage_ppm[LEVELS]; /* ascending */
	u64 release_ppm[LEVELS];
	u64 horizon_ns; /* rising record when max is nearer than this ... */
	u64 horizon_floor_ppm; /* ... and this much is in use */
	u64 verified_pages; /* unreclaimable as memory.stat said ... */
	u64 verified_at_pages; /* ... when charged_pages was this */
	u64 verify_after_pages; /* VERIFY once so much more is charged; 0: never verified, never asks */
	u64 stall_engage_ns; /* STALL at so much in one window; 0: never */
	u64 epoch; /* a change makes the programs forget level and horizon, so that they are reported again */
};

/* track[cgroup id]: made by the reader with zeros, then written by the programs only. */
struct track {
	u64 charged_pages;
	u64 epoch;
	u64 window_ns; /* where the window of the fill rate began ... */
	u64 window_pages; /* ... and at what bound */
	u64 rate_pages; /* per second, of the last whole window */
	u64 level;
	u64 near; /* the horizon was reported */
	u64 verify_asked; /* 1 + verified_at_pages for which VERIFY was sent */
	u64 stall_ns;
	u64 stall_window_start_ns;
	u64 stall_in_window_ns;
	u64 stalled;
	u64 trend_ns; /* where the window of the trend began; 0: not yet ... */
	u64 trend_pages; /* ... at what bound ... */
	u64 trend_next_ns; /* ... and where the next one will have begun */
	u64 trend_next_pages;
	u64 own; /* usage - file LRU when they were last read, in pages << 32, and the low half of charged_pages then */
};

#endif
