/*
 * A bounded cache of an image's metadata tables, all of one size and in one file.
 *
 * How this works. Tables are found by their host offset in a hash and stand in one list by age. A table that is
 * clean and not pinned may be given up for another. Where all are dirty, a plan must run first. A read from the page cache is done
 * in place; one that would wait is the caller's to do (WANT_TABLE), except in a tool.
 *
 *      absent -> loading -> clean <-> dirty
 *
 * tables_gather() copies what is dirty and marks it clean at once: a change made while the plan runs makes
 * it dirty again, for the next plan. It must not be given up before the plan ran, though, or a reader would get the old
 * bytes from the file: `writing` keeps it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include "vmm/cleanup.h"
#include "format.h"

#define HASH_SIZE 512
#define LEAST     8             /* tables that a cache has room for, whatever was asked */

struct slot {
	struct table t;
	bool writing;           /* its copy is in the plan that runs */
};

struct tables {
	struct image *image;
	struct host_file *file;
	uint32_t size;
	unsigned count, most, dirty;
	struct table *hash[HASH_SIZE];
	struct table *young, *old;
};

static struct slot *slot_of(struct table *t)
{
	return container_of(t, struct slot, t);
}

struct tables *tables_new_file(struct image *i, struct host_file *f, uint32_t size, unsigned most)
{
	struct tables *t = calloc(1, sizeof(*t));

	if (t)
		*t = (struct tables){ .image = i, .file = f, .size = size, .most = MAX(most, LEAST) };
	return t;
}

struct tables *tables_new(struct image *i, uint32_t size, unsigned most)
{
	return tables_new_file(i, &i->file, size, most);
}

static struct table **hash_place(struct tables *t, uint64_t off)
{
	uint64_t n = off / t->size * 0x9e3779b97f4a7c15ull;

	return &t->hash[n >> 55];
}

static void list_remove(struct tables *t, struct table *e)
{
	*(e->lru_prev ? &e->lru_prev->lru_next : &t->young) = e->lru_next;
	*(e->lru_next ? &e->lru_next->lru_prev : &t->old) = e->lru_prev;
}

static void list_add(struct tables *t, struct table *e)
{
	e->lru_prev = NULL;
	e->lru_next = t->young;
	*(t->young ? &t->young->lru_prev : &t->old) = e;
	t->young = e;
}

static void unlink_table(struct tables *t, struct table *e)
{
	struct table **at = hash_place(t, e->off);

	while (*at != e)
		at = &(*at)->hash_next;
	*at = e->hash_next;
	list_remove(t, e);
	t->dirty -= e->dirty;
}

static void free_table(struct tables *t, struct table *e)
{
	unlink_table(t, e);
	free(e->data);
	free(slot_of(e));
	t->count--;
}

void tables_free(struct tables *t)
{
	if (!t)
		return;
	while (t->young)
		free_table(t, t->young);
	free(t);
}

static struct table *find(struct tables *t, uint64_t off)
{
	struct table *e = *hash_place(t, off);

	while (e && e->off != off)
		e = e->hash_next;
	return e;
}

static struct table *new_table(struct tables *t)
{
	struct slot *s = calloc(1, sizeof(*s));

	if (!s || posix_memalign(&s->t.data, MIN(t->size, 4096u), t->size)) {
		free(s);
		return NULL;
	}
	s->t.owner = t;
	s->t.file = t->file;
	t->count++;
	return &s->t;
}

/* The oldest one that nobody needs, out of the hash and the list; the youngest four were promised to stay. */
static struct table *victim(struct tables *t)
{
	struct table *fourth = t->young;

	for (unsigned n = 1; n < 4 && fourth; n++)
		fourth = fourth->lru_next;
	for (struct table *e = t->old; fourth && e != fourth; e = e->lru_prev) {
		if (e->dirty || e->pins || e->loading || slot_of(e)->writing)
			continue;
		unlink_table(t, e);
		return e;
	}
	return NULL;
}

/* Room for one more: 0; -EAGAIN: after a plan. */
static int room(struct tables *t, struct table **ret)
{
	struct table *e = t->count < t->most ? new_table(t) : victim(t);
	int r;

	if (!e && t->count < t->most)
		return -ENOMEM;
	if (!e && t->image->blocking && !t->image->gathering) {
		r = image_write_metadata(t->image);
		if (r)
			return r;
		e = victim(t);
	}
	if (!e && t->image->blocking)   /* all pinned, or inside a plan: a little more than the bound */
		e = new_table(t);
	if (!e) {
		t->image->want = WANT_PLAN;
		return t->image->blocking ? -ENOMEM : -EAGAIN;
	}
	*ret = e;
	return 0;
}

static void enter(struct tables *t, struct table *e, uint64_t off)
{
	struct table **at = hash_place(t, off);

	e->off = off;
	e->err = 0;
	e->dirty = e->loading = false;
	slot_of(e)->writing = false;
	e->hash_next = *at;
	*at = e;
	list_add(t, e);
}

void table_loaded(struct table *e, int res)
{
	if (res < 0) {  /* what a format says when it wants to be asked again must not come from the host */
		e->err = res == -EAGAIN || res == -EBUSY ? -EIO : res;
	} else if (res == 0) {          /* past the end of the file */
		memset(e->iov.iov_base, 0, e->iov.iov_len);
		e->iov.iov_len = 0;
	} else {
		e->iov.iov_base = (uint8_t *)e->iov.iov_base + res;
		e->iov.iov_len -= (size_t)res;
	}
	e->loading = !e->err && e->iov.iov_len;
}

/* Bytes of the table that are there: where reading goes on. */
static uint64_t read_at(const struct table *e)
{
	return e->off + (uint64_t)((uint8_t *)e->iov.iov_base - (uint8_t *)e->data);
}

static int start_read(struct tables *t, struct table *e)
{
	struct host_file *f = e->file;
	ssize_t n;

	e->iov = (struct iovec){ e->data, t->size };
	e->loading = true;
	if (t->image->blocking) {
		table_loaded(e, meta_read(f, e->data, t->size, e->off) ?: (int)t->size);
		return e->err;
	}
	while (e->loading) {
		n = preadv2(f->meta_fd, &e->iov, 1, (off_t)read_at(e), f->meta_flags);
		if (n < 0)
			return -EAGAIN;         /* it would wait, or the ring will say what is wrong */
		table_loaded(e, (int)n);
	}
	return 0;
}

int tables_get(struct tables *t, uint64_t off, struct table **ret)
{
	struct table *e = find(t, off);
	int r = 0;

	if (!e) {
		r = room(t, &e);
		if (r)
			return r;
		enter(t, e, off);
		r = start_read(t, e);
	} else if (t->young != e) {
		list_remove(t, e);
		list_add(t, e);
	}
	if (e->loading) {
		t->image->want = WANT_TABLE;
		t->image->want_table = e;
		return -EAGAIN;
	}
	if (e->err) {
		r = e->err;
		free_table(t, e);
		return r;
	}
	*ret = e;
	return 0;
}

int tables_make(struct tables *t, uint64_t off, struct table **ret)
{
	struct table *e = find(t, off);
	int r;

	if (!e) {
		r = room(t, &e);
		if (r)
			return r;
		enter(t, e, off);
	}
	if (e->loading) {               /* forgotten meanwhile: what is still to come would lie over the zeroes */
		t->image->want = WANT_TABLE;
		t->image->want_table = e;
		return -EAGAIN;
	}
	memset(e->data, 0, t->size);
	table_dirty(e);
	*ret = e;
	return 0;
}

void tables_forget(struct tables *t, uint64_t off)
{
	struct table *e = find(t, off);

	if (!e)
		return;
	if (slot_of(e)->writing || e->loading) {        /* in use below: it just must not be written again */
		t->dirty -= e->dirty;
		e->dirty = false;
		return;
	}
	free_table(t, e);
}

void tables_settle(struct tables *t, uint64_t off)
{
	struct table *e = find(t, off);

	if (e && e->err)
		free_table(t, e);
}

void table_pin(struct table *e)
{
	e->pins++;
}

void table_unpin(struct table *e)
{
	e->pins--;
}

void table_dirty(struct table *e)
{
	e->owner->dirty += !e->dirty;
	e->dirty = true;
}

bool tables_any_dirty(const struct tables *t)
{
	return t->dirty;
}

static int by_offset(const void *a, const void *b)
{
	const struct table *x = *(struct table *const *)a, *y = *(struct table *const *)b;

	return x->off < y->off ? -1 : x->off > y->off;
}

/* Shell sort: qsort() may take memory by calls that a filter stops. */
static void sort_tables(struct table **list, unsigned n)
{
	for (unsigned gap = n / 2; gap; gap /= 2)
		for (unsigned i = gap; i < n; i++) {
			struct table *e = list[i];
			unsigned at = i;

			for (; at >= gap && by_offset(&list[at - gap], &e) > 0; at -= gap)
				list[at] = list[at - gap];
			list[at] = e;
		}
}

int tables_gather(struct tables *t, struct plan *p)
{
	auto_free struct table **list = calloc(t->dirty + 1, sizeof(*list));
	unsigned n = 0, before = p->n;
	int r = list ? 0 : -ENOMEM;

	for (struct table *e = t->young; e && !r; e = e->lru_next)
		if (e->dirty)
			list[n++] = e;
	sort_tables(list, r ? 0 : n);
	for (unsigned i = 0; i < n && !r; i++)
		r = plan_write(p, list[i]->off, list[i]->data, t->size);
	if (r) {
		while (p->n > before)
			free(p->step[--p->n].data);
		return r;
	}
	for (unsigned i = 0; i < n; i++) {
		list[i]->dirty = false;
		slot_of(list[i])->writing = true;
	}
	t->dirty = 0;
	return 0;
}

void tables_gathered(struct tables *t, int err)
{
	for (struct table *e = t->young; e; e = e->lru_next) {
		if (!slot_of(e)->writing)
			continue;
		slot_of(e)->writing = false;
		if (err)
			table_dirty(e);
	}
}
