/*
 * Faults, delays, limits, error policy.
 *
 * How this works. A request is a `held` from gate_enter() to the end:
 *
 *      enter -> fate -> [queue: limits] -> [waiting: delay, timeout] -> fail ------------------+
 *        ^              one FIFO for reads,    sorted by time           pass -> image -> leave -+-> report, ignore -> end
 *        |              one for the rest                                                        +-> stop
 *        +------------------------------- a second later: the oldest first <--- stopped <-------+
 *
 * Its fate (which fault, if any) is decided when it arrives, from the count of its kind and the disk's seed, so a
 * run can be repeated. Retries are requests too: they count, and may meet a fault.
 *
 * A limit is a bucket that leaks at its rate, kept as the time at which all that went through is paid for.
 * A request may go while that lies no more than the bucket's size ahead; what it costs is added afterwards,
 * so a request larger than the bucket goes, too, and the next one waits for it. The fractions of a
 * nanosecond are kept, and a timer that is late costs nothing: the rate is exact in the long run.
 */
#include "gate.h"
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "format.h"
#include "splitmix.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "writelog.h"

#define FAULTS_MAX   32
#define SECOND       1000000000ull
#define DELAY_MAX_NS (3600 * SECOND)
#define SLACK_NS     20000000ull        /* bucket of a limit without *_max: 20 ms of its rate */
#define COST_MAX_NS  (1ull << 60)
#define RETRY_NS     SECOND
#define TIMEOUT_NS   (60 * SECOND)

enum kind { K_READ, K_WRITE, K_FLUSH, K_DISCARD, KINDS };
enum fate { F_PASS, F_FAIL, F_TIMEOUT, F_TORN };
enum policy { P_REPORT, P_STOP, P_IGNORE, P_ENOSPC };
enum unit { U_OPS, U_BYTES, UNITS };
enum whose { W_ALL, W_READS, W_WRITES, WHOSE };

static const char *const kind_names[] = { "read", "write", "flush", "discard", NULL };

struct fault {
	enum kind kind;
	enum fate fate;
	int err;
	uint64_t at, every, times;      /* 0: does not matter */
	uint64_t first, last;           /* sectors */
	uint64_t chance;                /* of 2^53 */
	uint64_t random, hits;
};

struct bucket {
	uint64_t rate;                  /* a second; 0: no limit */
	uint64_t ahead_ns;
	uint64_t paid_ns;               /* all that went through is paid for then */
	uint64_t rest;                  /* of a nanosecond, in 1/rate */
};

struct held {
	struct blk_req *r;
	struct held *next;
	enum kind kind;
	enum fate fate;
	bool retried;                   /* it has been in `stopped` */
	int err;
	uint64_t seq, due_ns;
	uint64_t len;                   /* of the request, when a torn one is shorter */
	struct writelog_item *log;
	struct iovec one;               /* the log's copy */
	struct iovec *place;            /* the requester's iovecs, and what they were: for a retry */
	unsigned cnt;
	struct iovec iov[BLK_IOVS];
};

struct queue {
	struct held *first, **last;
};

struct gate {
	/* const after gate_new() */
	struct gate_door door;
	struct loop *home;
	void (*hold)(void *arg, bool on);
	void *arg;
	struct writelog *log;
	enum policy policy[KINDS];
	bool retries, limited;
	uint64_t seed, timeout_ns;
	struct {
		uint64_t least, most;
	} delay[KINDS];

	/* home loop */
	struct fault fault[FAULTS_MAX];
	unsigned nr_faults;
	struct bucket bucket[UNITS][WHOSE];
	uint64_t random;                /* delays, torn writes */
	uint64_t count[KINDS], seq;
	struct held *free;
	struct queue limits[2];         /* reads, all else */
	struct queue for_room;          /* in the log */
	bool in_room;
	struct held *waiting;           /* by due_ns */
	struct queue stopped;
	unsigned nr_stopped;            /* with those on their way for another try */
	bool draining;
	struct loop_timer limit_timer, wait_timer, retry_timer;
	struct log_limit limit;

	/* written by the home loop */
	_Atomic uint64_t faults, delayed, tries, stops, ignored;
	_Atomic bool is_stopped;
};

static void tally(_Atomic uint64_t *n)
{
	atomic_fetch_add_explicit(n, 1, memory_order_relaxed);
}

/* ---- keys; main thread ---- */

static int word(const char *text, size_t n, const char *const *words)
{
	for (int i = 0; words[i]; i++)
		if (strlen(words[i]) == n && !strncmp(words[i], text, n))
			return i;
	return -1;
}

/* "A" or "A-B" */
static int parse_sectors(const char *s, struct fault *f)
{
	char text[64], *dash;

	if (strlen(s) >= sizeof(text))
		return -EINVAL;
	strcpy(text, s);
	dash = strchr(text, '-');
	if (dash)
		*dash = '\0';
	if (parse_u64(text, &f->first))
		return -EINVAL;
	f->last = f->first;
	if (dash && parse_u64(dash + 1, &f->last))
		return -EINVAL;
	return f->first <= f->last ? 0 : -EINVAL;
}

static int parse_chance(const char *s, struct fault *f)
{
	char *end = (char *)s;
	double p = isdigit((unsigned char)*s) || *s == '.' ? strtod(s, &end) : -1;

	if (!(p > 0 && p <= 1) || *end)
		return -EINVAL;
	f->chance = (uint64_t)ldexp(p, 53);
	return 0;
}

static int parse_count(const char *s, uint64_t *val)
{
	return parse_u64(s, val) || !*val ? -EINVAL : 0;
}

static int parse_condition(char *text, struct fault *f)
{
	char *eq = strchr(text, '=');

	if (!eq)
		return -EINVAL;
	*eq++ = '\0';
	if (!strcmp(text, "at"))
		return parse_count(eq, &f->at);
	if (!strcmp(text, "every"))
		return parse_count(eq, &f->every);
	if (!strcmp(text, "times"))
		return parse_count(eq, &f->times);
	if (!strcmp(text, "sector"))
		return parse_sectors(eq, f);
	if (!strcmp(text, "p"))
		return parse_chance(eq, f);
	return -EINVAL;
}

static int parse_action(const char *s, struct fault *f)
{
	static const char *const actions[] = { "eio", "enospc", "timeout", "torn", NULL };

	switch (word(s, strlen(s), actions)) {
	case 0:
		f->fate = F_FAIL;
		f->err = -EIO;
		return 0;
	case 1:
		f->fate = F_FAIL;
		f->err = -ENOSPC;
		return f->kind == K_READ ? -EINVAL : 0;
	case 2:
		f->fate = F_TIMEOUT;
		f->err = -ETIMEDOUT;
		return 0;
	case 3:
		f->fate = F_TORN;
		f->err = -EIO;
		return f->kind == K_WRITE ? 0 : -EINVAL;
	}
	return -EINVAL;
}

static int parse_fault(char *text, struct fault *f)
{
	char *rest = text, *part = strsep(&rest, ":");
	int kind = word(part, strlen(part), kind_names), r;

	*f = (struct fault){ .kind = (enum kind)kind, .last = UINT64_MAX, .chance = 1ull << 53 };
	if (kind < 0 || !rest)
		return -EINVAL;
	r = parse_action(strsep(&rest, ":"), f);
	while (!r && rest)
		r = parse_condition(strsep(&rest, ":"), f);
	if (!r && f->kind == K_FLUSH && f->last != UINT64_MAX)
		r = -EINVAL;            /* a flush has no sectors */
	return r;
}

static int read_faults(struct gate *g, struct opts *o, struct error *err)
{
	const char *text;

	for (unsigned i = 0; (text = opts_nth(o, "fault", i)); i++) {
		auto_free char *copy = strdup(text);
		struct fault *f = &g->fault[i];

		if (i == FAULTS_MAX)
			return error_set(err, EINVAL, "%s: fault= given more than %d times", opts_option(o), FAULTS_MAX);
		if (!copy)
			return error_set(err, ENOMEM, "out of memory");
		if (parse_fault(copy, f))
			return error_set(err, EINVAL, "%s: fault=%s: expected read, write, flush or discard, then :eio, "
				":enospc (not of reads), :timeout or :torn (of writes), then :at=N, :every=N, :times=N, "
				":sector=A-B (not of flushes) or :p=0.01", opts_option(o), text);
		f->random = g->seed + (i + 1) * 0x2545f4914f6cdd1dull;
		g->nr_faults = i + 1;
	}
	return 0;
}

/* "5ms" or "1ms-5ms" */
static int parse_times(char *text, uint64_t *least, uint64_t *most)
{
	char *dash = strchr(text, '-');

	if (dash)
		*dash++ = '\0';
	if (parse_seconds(text, least))
		return -EINVAL;
	*most = *least;
	if (dash && parse_seconds(dash, most))
		return -EINVAL;
	return *least <= *most && *most <= DELAY_MAX_NS ? 0 : -EINVAL;
}

static int parse_delay(struct gate *g, char *text)
{
	char *colon = strchr(text, ':');
	int kind = colon ? word(text, (size_t)(colon - text), kind_names) : KINDS;
	uint64_t least, most;

	if (kind < 0 || parse_times(colon ? colon + 1 : text, &least, &most))
		return -EINVAL;
	for (int k = 0; k < KINDS; k++) {
		if (kind != KINDS && kind != k)
			continue;
		g->delay[k].least = least;
		g->delay[k].most = most;
	}
	return 0;
}

static int read_delays(struct gate *g, struct opts *o, struct error *err)
{
	const char *text;

	for (unsigned i = 0; (text = opts_nth(o, "delay", i)); i++) {
		auto_free char *copy = strdup(text);

		if (!copy)
			return error_set(err, ENOMEM, "out of memory");
		if (parse_delay(g, copy))
			return error_set(err, EINVAL, "%s: delay=%s: expected a time such as 5ms or 1ms-5ms (at most an hour), "
				"perhaps after read:, write:, flush: or discard:", opts_option(o), text);
	}
	return 0;
}

static int read_limit(struct bucket *b, struct opts *o, enum unit unit, const char *key, const char *max_key,
	struct error *err)
{
	uint64_t size = 0;
	int r = unit == U_OPS ? opts_u64(o, key, 1, SECOND, &b->rate, err)
			      : opts_size(o, key, SECTOR, 1ull << 50, &b->rate, err);

	if (!r)
		r = unit == U_OPS ? opts_u64(o, max_key, 1, SECOND, &size, err)
				  : opts_size(o, max_key, SECTOR, 1ull << 50, &size, err);
	if (!r && size && !b->rate)
		r = error_set(err, EINVAL, "%s: %s is the burst of %s=, which is not given", opts_option(o), max_key, key);
	b->ahead_ns = SLACK_NS;
	if (!r && size)         /* in requests: the last one may go when the others are not paid for */
		b->ahead_ns = (uint64_t)MIN((unsigned __int128)(unit == U_OPS ? size - 1 : size) * SECOND / b->rate,
			(unsigned __int128)COST_MAX_NS);
	return r;
}

static int read_limits(struct gate *g, struct opts *o, struct error *err)
{
	static const char *const keys[UNITS][WHOSE][2] = {
		{ { "iops", "iops_max" }, { "iops_rd", "iops_rd_max" }, { "iops_wr", "iops_wr_max" } },
		{ { "bps", "bps_max" }, { "bps_rd", "bps_rd_max" }, { "bps_wr", "bps_wr_max" } },
	};
	int r = 0;

	for (unsigned u = 0; u < UNITS && !r; u++) {
		for (unsigned w = 0; w < WHOSE && !r; w++) {
			r = read_limit(&g->bucket[u][w], o, (enum unit)u, keys[u][w][0], keys[u][w][1], err);
			g->limited |= g->bucket[u][w].rate > 0;
		}
	}
	return r;
}

static int read_policies(struct gate *g, struct opts *o, struct error *err)
{
	static const char *const names[] = { "report", "stop", "ignore", "enospc", NULL };
	static const char *const read_names[] = { "report", "stop", "ignore", NULL };
	int w = P_REPORT, r = P_REPORT, ret;

	if ((ret = opts_choice(o, "werror", names, &w, err)) || (ret = opts_choice(o, "rerror", read_names, &r, err)))
		return ret;
	for (int k = 0; k < KINDS; k++)
		g->policy[k] = (enum policy)(k == K_READ ? r : w);
	g->retries = r == P_STOP || w == P_STOP || w == P_ENOSPC;
	return 0;
}

static int read_timeout(struct gate *g, struct opts *o, struct error *err)
{
	const char *text = opts_str(o, "timeout");

	g->timeout_ns = TIMEOUT_NS;
	if (text && (parse_seconds(text, &g->timeout_ns) || g->timeout_ns > DELAY_MAX_NS))
		return error_set(err, EINVAL, "%s: timeout=%s: expected a time such as 30 or 500ms, at most an hour",
			opts_option(o), text);
	return 0;
}

static bool is_used(const struct gate *g)
{
	bool used = g->nr_faults || g->limited || g->log;

	for (int k = 0; k < KINDS; k++)
		used |= g->delay[k].most || g->policy[k] != P_REPORT;
	return used;
}

static int read_keys(struct gate *g, struct opts *o, struct error *err)
{
	const char *log;
	int r;

	if ((r = opts_u64(o, "seed", 0, UINT64_MAX, &g->seed, err)) || (r = read_faults(g, o, err)) ||
		(r = read_timeout(g, o, err)) || (r = read_delays(g, o, err)) || (r = read_limits(g, o, err)) ||
		(r = read_policies(g, o, err)))
		return r;
	g->random = g->seed;
	log = opts_str(o, "log");
	if (!log)
		return 0;
	r = writelog_open(&g->log, log, err);
	if (r)
		error_prefix(err, "%s: ", opts_option(o));
	return r;
}

static void queue_init(struct queue *q)
{
	*q = (struct queue){ .last = &q->first };
}

static void limit_due(struct loop_timer *t);
static void wait_due(struct loop_timer *t);
static void retry_due(struct loop_timer *t);

int gate_new(struct gate **ret, struct opts *o, const struct gate_door *door, struct error *err)
{
	struct gate *g = calloc(1, sizeof(*g));
	int r;

	if (!g)
		return error_set(err, ENOMEM, "out of memory");
	g->door = *door;
	queue_init(&g->limits[0]);
	queue_init(&g->limits[1]);
	queue_init(&g->for_room);
	queue_init(&g->stopped);
	g->limit_timer.fn = limit_due;
	g->wait_timer.fn = wait_due;
	g->retry_timer.fn = retry_due;
	r = read_keys(g, o, err);
	*ret = NULL;
	if (r || !is_used(g))
		gate_free(g);
	else
		*ret = g;
	return r;
}

void gate_free(struct gate *g)
{
	struct held *h;

	if (!g)
		return;
	while ((h = g->free)) {
		g->free = h->next;
		free(h);
	}
	writelog_free(g->log);
	free(g);
}

void gate_set_hold(struct gate *g, void (*hold)(void *arg, bool on), void *arg)
{
	g->hold = hold;
	g->arg = arg;
}

void gate_describe(struct gate *g, struct facts *f)
{
	facts_u64(f, "faults", atomic_load(&g->faults));
	facts_u64(f, "delayed", atomic_load(&g->delayed));
	facts_u64(f, "errors_ignored", atomic_load(&g->ignored));
	facts_u64(f, "stops", atomic_load(&g->stops));
	facts_u64(f, "retries", atomic_load(&g->tries));
	facts_bool(f, "stopped", atomic_load(&g->is_stopped));
	facts_u64(f, "seed", g->seed);
	if (!g->log)
		return;
	facts_str(f, "log", writelog_path(g->log));
	facts_u64(f, "log_entries", writelog_entries(g->log));
	facts_str(f, "log_error", writelog_error(g->log) ? strerrordesc_np(-writelog_error(g->log)) : NULL);
}

/* ---- lists; home loop ---- */

static struct held *take(struct gate *g)
{
	struct held *h = g->free;

	if (h)
		g->free = h->next;
	else
		h = malloc(sizeof(*h));
	return h;
}

static void push(struct queue *q, struct held *h)
{
	h->next = NULL;
	*q->last = h;
	q->last = &h->next;
}

static void push_front(struct queue *q, struct held *h)
{
	h->next = q->first;
	q->first = h;
	if (!h->next)
		q->last = &h->next;
}

static struct held *pop(struct queue *q)
{
	struct held *h = q->first;

	q->first = h->next;
	if (!q->first)
		q->last = &q->first;
	return h;
}

/* ---- the end of a request ---- */

/* The last of those that stopped the machine is through, this way or that. */
static void unstop(struct gate *g)
{
	if (--g->nr_stopped)
		return;
	atomic_store(&g->is_stopped, false);
	if (!g->draining)
		log_guest(&g->limit, "'%s': what failed has been done now: the machine goes on", g->door.name);
	if (g->hold)
		g->hold(g->arg, false);
}

static void finish(struct gate *g, struct held *h, int err)
{
	struct blk_req *r = h->r;
	bool retried = h->retried;

	r->held = NULL;
	h->next = g->free;
	g->free = h;
	g->door.end(r, err);
	if (!retried)
		return;
	unstop(g);
	if (g->stopped.first && !g->draining)
		loop_set_timer(g->home, &g->retry_timer, loop_now());
}

static void stop(struct gate *g, struct held *h)
{
	loop_set_timer(g->home, &g->retry_timer, loop_now() + RETRY_NS);
	if (h->retried)
		return push_front(&g->stopped, h);
	h->retried = true;
	push(&g->stopped, h);
	if (g->nr_stopped++)
		return;
	tally(&g->stops);
	atomic_store(&g->is_stopped, true);
	log_guest(&g->limit, "'%s': a %s failed: %s: the machine is stopped; it is tried again each second",
		g->door.name, kind_names[h->kind], strerrordesc_np(-h->err));
	if (g->hold)
		g->hold(g->arg, true);
}

static bool is_full(int err)
{
	return err == -ENOSPC || err == -EDQUOT || err == -EFBIG;
}

/* A driver copes with "cannot be done", and it would be no different a second later. */
static bool may_stop(const struct gate *g, const struct held *h)
{
	enum policy p = g->policy[h->kind];

	return !g->draining && (p == P_STOP || (p == P_ENOSPC && is_full(h->err)));
}

static void settle(struct gate *g, struct held *h, int err)
{
	h->err = err;
	if (!err || err == -EOPNOTSUPP)
		return finish(g, h, err);
	if (may_stop(g, h))
		return stop(g, h);
	if (g->policy[h->kind] == P_IGNORE) {
		tally(&g->ignored);
		err = 0;
	}
	finish(g, h, err);
}

/* ---- to the image and back ---- */

static void go_now(struct gate *g, struct held *h)
{
	struct blk_req *r = h->r;
	int err = g->log ? writelog_begin(g->log, r, &h->log) : 0;

	if (err)
		return settle(g, h, err);
	if (h->log && writelog_data(h->log)) {  /* what is logged is what is written, whatever the guest does meanwhile */
		h->one = (struct iovec){ writelog_data(h->log), r->len };
		r->iov = &h->one;
		r->cnt = 1;
	}
	g->door.pass(r);
}

static void go(struct gate *g, struct held *h)
{
	if (g->log && (g->for_room.first || !writelog_room(g->log, h->r)))
		push(&g->for_room, h);
	else
		go_now(g, h);
}

/* The log took something off its hands. */
static void room(void *arg)
{
	struct gate *g = arg;

	if (g->in_room)
		return;
	g->in_room = true;
	while (g->for_room.first && writelog_room(g->log, g->for_room.first->r))
		go_now(g, pop(&g->for_room));
	g->in_room = false;
}

void gate_leave(struct gate *g, struct blk_req *r, int err, bool durable)
{
	struct held *h = r->held;
	struct writelog_item *log = h->log;

	ON_LOOP(g->home);
	h->log = NULL;
	r->len = h->len;
	if (log)
		writelog_end(g->log, log, !err, durable && h->kind == K_WRITE);
	settle(g, h, !err && h->fate == F_TORN ? h->err : err);
	if (log)
		room(g);
}

/* Leave a prefix: at least one sector less than all. False: that is nothing. */
static bool tear(struct gate *g, struct blk_req *r)
{
	uint64_t keep = splitmix(&g->random) % MAX(r->len / SECTOR, 1) * SECTOR, left = keep;
	unsigned i;

	if (!keep)
		return false;
	r->len = keep;
	if (r->op != BLK_WRITE)
		return true;
	for (i = 0; left; i++) {
		if (r->iov[i].iov_len > left)
			r->iov[i].iov_len = left;
		left -= r->iov[i].iov_len;
	}
	r->cnt = i;
	return true;
}

static void meet_fate(struct gate *g, struct held *h)
{
	switch (h->fate) {
	case F_PASS:
		return go(g, h);
	case F_TORN:
		if (tear(g, h->r))
			return go(g, h);
		return settle(g, h, h->err);
	case F_FAIL:
	case F_TIMEOUT:
		return settle(g, h, h->err);
	}
}

/* ---- delays ---- */

static void wait_due(struct loop_timer *t)
{
	struct gate *g = container_of(t, struct gate, wait_timer);
	uint64_t now = loop_now();

	while (g->waiting && g->waiting->due_ns <= now) {
		struct held *h = g->waiting;

		g->waiting = h->next;
		meet_fate(g, h);
	}
	if (g->waiting)
		loop_set_timer(g->home, &g->wait_timer, g->waiting->due_ns);
}

static void wait_until(struct gate *g, struct held *h, uint64_t at)
{
	struct held **p = &g->waiting;

	h->due_ns = at;
	while (*p && (*p)->due_ns <= at)
		p = &(*p)->next;
	h->next = *p;
	*p = h;
	if (g->waiting == h)
		loop_set_timer(g->home, &g->wait_timer, at);
}

static void wait(struct gate *g, struct held *h)
{
	uint64_t least = g->delay[h->kind].least, most = g->delay[h->kind].most;
	uint64_t ns = h->fate == F_TIMEOUT ? g->timeout_ns : least;

	if (h->fate != F_TIMEOUT && most > least)
		ns += splitmix(&g->random) % (most - least + 1);
	if (!ns || g->draining)
		return meet_fate(g, h);
	tally(&g->delayed);
	wait_until(g, h, loop_now() + ns);
}

/* ---- limits ---- */

/* When this request may go; 0: now. */
static uint64_t when(const struct gate *g, const struct held *h, uint64_t now)
{
	enum whose own = h->kind == K_READ ? W_READS : W_WRITES;
	uint64_t at = 0;

	for (unsigned u = 0; u < UNITS; u++) {
		const enum whose pair[] = { W_ALL, own };

		for (unsigned i = 0; i < 2; i++) {
			const struct bucket *b = &g->bucket[u][pair[i]];

			if (b->rate && b->paid_ns > now + b->ahead_ns)
				at = MAX(at, b->paid_ns - b->ahead_ns);
		}
	}
	return at;
}

static void charge(struct bucket *b, uint64_t cost, uint64_t now)
{
	unsigned __int128 ns;

	if (!b->rate)
		return;
	if (b->paid_ns < now) {
		b->paid_ns = now;
		b->rest = 0;
	}
	ns = (unsigned __int128)cost * SECOND + b->rest;
	b->rest = (uint64_t)(ns % b->rate);
	b->paid_ns += (uint64_t)MIN(ns / b->rate, (unsigned __int128)COST_MAX_NS);
}

static void pay(struct gate *g, const struct held *h, uint64_t now)
{
	enum whose own = h->kind == K_READ ? W_READS : W_WRITES;
	uint64_t bytes = h->r->op == BLK_READ || h->r->op == BLK_WRITE ? h->len : 0;

	charge(&g->bucket[U_OPS][W_ALL], 1, now);
	charge(&g->bucket[U_OPS][own], 1, now);
	charge(&g->bucket[U_BYTES][W_ALL], bytes, now);
	charge(&g->bucket[U_BYTES][own], bytes, now);
}

/* Of two that may go now the one that came first; else when the next may. */
static struct queue *choose(struct gate *g, uint64_t now, uint64_t *next)
{
	struct queue *best = NULL;

	*next = UINT64_MAX;
	for (unsigned i = 0; i < ARRAY_LEN(g->limits); i++) {
		struct queue *q = &g->limits[i];
		uint64_t at;

		if (!q->first)
			continue;
		at = when(g, q->first, now);
		if (at)
			*next = MIN(*next, at);
		else if (!best || q->first->seq < best->first->seq)
			best = q;
	}
	return best;
}

/* fresh: it has only just come; any other was held back. */
static void pump(struct gate *g, const struct held *fresh)
{
	uint64_t now = loop_now(), next;
	struct queue *q;

	while ((q = choose(g, now, &next))) {
		struct held *h = pop(q);

		pay(g, h, now);
		if (h != fresh)
			tally(&g->delayed);
		wait(g, h);
	}
	if (next != UINT64_MAX)
		loop_set_timer(g->home, &g->limit_timer, next);
}

static void limit_due(struct loop_timer *t)
{
	pump(container_of(t, struct gate, limit_timer), NULL);
}

/* ---- arrival ---- */

static bool applies(struct gate *g, struct fault *f, const struct held *h)
{
	const struct blk_req *r = h->r;
	uint64_t n = g->count[h->kind], first = r->off / SECTOR, end = (r->off + r->len) / SECTOR;

	if (f->kind != h->kind || (f->at && n != f->at) || (f->every && n % f->every) ||
		(f->times && f->hits == f->times))
		return false;
	if (h->kind != K_FLUSH && (f->last < first || f->first >= end))
		return false;
	return splitmix(&f->random) >> 11 < f->chance;
}

/* Every fault that could apply draws, so that one's chance does not depend on another. */
static void decide(struct gate *g, struct held *h)
{
	const struct fault *hit = NULL;

	g->count[h->kind]++;
	h->fate = F_PASS;
	for (unsigned i = 0; i < g->nr_faults; i++) {
		struct fault *f = &g->fault[i];

		if (!applies(g, f, h) || hit)
			continue;
		f->hits++;
		hit = f;
	}
	if (!hit)
		return;
	h->fate = hit->fate;
	h->err = hit->err;
	tally(&g->faults);
}

static enum kind kind_of(const struct blk_req *r)
{
	switch (r->op) {
	case BLK_READ:
		return K_READ;
	case BLK_FLUSH:
		return K_FLUSH;
	case BLK_DISCARD:
		return K_DISCARD;
	case BLK_WRITE:
	case BLK_ZERO:
		break;
	}
	return K_WRITE;
}

void gate_enter(struct gate *g, struct blk_req *r)
{
	struct held *h = take(g);

	ON_LOOP(g->home);
	if (!h)
		return g->door.end(r, -ENOMEM);
	r->held = h;
	h->r = r;
	h->kind = kind_of(r);
	h->retried = false;
	h->err = 0;
	h->seq = g->seq++;
	h->len = r->len;
	h->log = NULL;
	h->cnt = 0;
	if (g->retries && r->cnt && (r->op == BLK_READ || r->op == BLK_WRITE)) {
		h->place = r->iov;
		h->cnt = r->cnt;
		memcpy(h->iov, r->iov, r->cnt * sizeof(r->iov[0]));
	}
	decide(g, h);
	if (!g->limited || g->draining || h->kind == K_FLUSH)   /* a flush moves nothing of its own */
		return wait(g, h);
	push(&g->limits[h->kind != K_READ], h);
	pump(g, h);
}

static void again(struct gate *g, struct held *h)
{
	struct blk_req *r = h->r;

	tally(&g->tries);
	if (h->cnt) {
		memcpy(h->place, h->iov, h->cnt * sizeof(h->iov[0]));
		r->iov = h->place;
		r->cnt = h->cnt;
	}
	decide(g, h);
	meet_fate(g, h);
}

static void retry_due(struct loop_timer *t)
{
	struct gate *g = container_of(t, struct gate, retry_timer);

	if (g->stopped.first)
		again(g, pop(&g->stopped));
}

/* ---- drain ---- */

void gate_set_home(struct gate *g, struct loop *home)
{
	g->home = home;
	if (g->log)
		writelog_set_home(g->log, home, room, g);
}

void gate_drain(struct gate *g)
{
	ON_LOOP(g->home);
	g->draining = true;
	loop_del_timer(g->home, &g->limit_timer);
	loop_del_timer(g->home, &g->wait_timer);
	loop_del_timer(g->home, &g->retry_timer);
	for (unsigned i = 0; i < ARRAY_LEN(g->limits); i++)
		while (g->limits[i].first)
			meet_fate(g, pop(&g->limits[i]));
	while (g->waiting) {
		struct held *h = g->waiting;

		g->waiting = h->next;
		meet_fate(g, h);
	}
	while (g->stopped.first) {
		struct held *h = pop(&g->stopped);

		finish(g, h, h->err);
	}
}

void gate_drained(struct gate *g)
{
	ON_LOOP(g->home);
	if (g->log)
		writelog_settle(g->log);
	g->draining = false;
}
