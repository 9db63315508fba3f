/* Timers: a binary heap by due time; slot is the place in it plus one. */
#include <time.h>
#include "loop_priv.h"

uint64_t loop_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + ts.tv_nsec;
}

static void put(struct loop *l, unsigned i, struct loop_timer *t)
{
	l->timer[i] = t;
	t->slot = i + 1;
}

/* Place t at i or wherever the heap order moves it from there. */
static void sift(struct loop *l, unsigned i, struct loop_timer *t)
{
	for (unsigned up; i > 0 && l->timer[up = (i - 1) / 2]->at_ns > t->at_ns; i = up)
		put(l, i, l->timer[up]);
	for (unsigned down; (down = 2 * i + 1) < l->nr_timers; i = down) {
		if (down + 1 < l->nr_timers && l->timer[down + 1]->at_ns < l->timer[down]->at_ns)
			down++;
		if (l->timer[down]->at_ns >= t->at_ns)
			break;
		put(l, i, l->timer[down]);
	}
	put(l, i, t);
}

void loop_set_timer(struct loop *l, struct loop_timer *t, uint64_t at_ns)
{
	ON_LOOP(l);
	t->at_ns = at_ns;
	if (!t->slot) {
		assert(l->nr_timers < LOOP_TIMERS);
		t->slot = ++l->nr_timers;
	}
	sift(l, t->slot - 1, t);
}

void loop_del_timer(struct loop *l, struct loop_timer *t)
{
	struct loop_timer *last;
	unsigned i;

	ON_LOOP(l);
	if (!t->slot)
		return;
	i = t->slot - 1;
	t->slot = 0;
	last = l->timer[--l->nr_timers];
	if (last != t)
		sift(l, i, last);
}

uint64_t timers_next(const struct loop *l)
{
	return l->nr_timers ? l->timer[0]->at_ns : FOREVER;
}

/* Those due now; one that a handler sets for the past waits for the next turn. */
void timers_run(struct loop *l)
{
	uint64_t now;

	if (!l->nr_timers)
		return;
	now = loop_now();
	for (unsigned left = l->nr_timers; left && timers_next(l) <= now; left--) {
		struct loop_timer *t = l->timer[0];

		loop_del_timer(l, t);
		t->fn(t);
	}
}
