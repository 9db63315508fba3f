/*
 * Metadata on its way out: what is to be written, in which order, as data of its own. The thread that owns the image
 * makes a plan from copies; any thread may then run it, while the image changes on.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "format.h"

static struct plan_step *add(struct plan *p)
{
	if (p->n == p->room) {
		unsigned room = p->room ? p->room * 2 : 16;
		struct plan_step *more = reallocarray(p->step, room, sizeof(*more));

		if (!more)
			return NULL;
		p->step = more;
		p->room = room;
	}
	return &p->step[p->n++];
}

static int add_range(struct plan *p, enum plan_kind kind, uint64_t off, uint64_t len)
{
	struct plan_step *s = add(p);

	if (!s)
		return -ENOMEM;
	*s = (struct plan_step){ .kind = kind, .off = off, .len = len };
	return 0;
}

int plan_write(struct plan *p, uint64_t off, const void *data, size_t len)
{
	void *copy = malloc(len);
	struct plan_step *s = copy ? add(p) : NULL;

	if (!s) {
		free(copy);
		return -ENOMEM;
	}
	memcpy(copy, data, len);
	*s = (struct plan_step){ .kind = PLAN_WRITE, .off = off, .len = len, .data = copy };
	return 0;
}

int plan_zero(struct plan *p, uint64_t off, uint64_t len)
{
	return add_range(p, PLAN_ZERO, off, len);
}

int plan_punch(struct plan *p, uint64_t off, uint64_t len)
{
	struct plan_step *last = p->n ? &p->step[p->n - 1] : NULL;

	if (last && last->kind == PLAN_PUNCH && last->off + last->len == off) {
		last->len += len;
		return 0;
	}
	return add_range(p, PLAN_PUNCH, off, len);
}

int plan_barrier(struct plan *p)
{
	if (p->no_barriers || (p->n && p->step[p->n - 1].kind == PLAN_BARRIER))
		return 0;
	return add_range(p, PLAN_BARRIER, 0, 0);
}

static int run_step(const struct plan_step *s, const struct host_file *f)
{
	switch (s->kind) {
	case PLAN_WRITE:
		return meta_write(f, s->data, s->len, s->off);
	case PLAN_ZERO:
		return meta_zero(f, s->off, s->len);
	case PLAN_BARRIER:
		return meta_sync(f);
	case PLAN_PUNCH:
		return meta_punch(f, s->off, s->len);
	}
	return -EINVAL;
}

int plan_run(struct plan *p, const struct host_file *f)
{
	int r = 0;

	for (unsigned i = 0; i < p->n && !r; i++) {
		r = run_step(&p->step[i], f);
		p->sync_failed = r && p->step[i].kind == PLAN_BARRIER;
	}
	return r;
}

void plan_clear(struct plan *p)
{
	for (unsigned i = 0; i < p->n; i++)
		free(p->step[i].data);
	free(p->step);
	*p = (struct plan){ .no_barriers = p->no_barriers };
}
