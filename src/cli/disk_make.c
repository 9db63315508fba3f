/* vmm disk create, resize, snapshot. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include "disk.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"

#define ZERO_CHUNK (1u << 20)

/* ---- create ---- */

int create_prepare(struct disk_args *a, struct error *err)
{
	int r = disk_parse_create(a, a->format, err);

	if (!r && a->nr == 2 && parse_size(a->file[1].path, &a->size))
		r = error_set(err, EINVAL, "'%s' is no size: 512, 64M, 10G", a->file[1].path);
	a->has_size = a->nr == 2;
	r = r ? r : disk_open_backing(a, a->file[0].path, err);
	if (!r && !a->has_size && !a->backing_at)
		r = error_set(err, EINVAL, "say also its size: vmm disk create %s 10G", a->file[0].path);
	return r ? r : disk_open_new(a, 0, err);
}

int create_work(struct disk_args *a, struct error *err)
{
	struct image_create *c = &a->create;
	char words[32];
	int r;

	if (a->backing_at) {
		struct image *backing;

		r = disk_image(a, &backing, a->backing_at, a->backing_format,
			(struct image_how){ .readonly = true, .alone = true, .share = true }, err);
		if (r)
			return r;
		c->backing = a->backing;
		c->backing_format = a->backing_format;
		a->size = a->has_size ? a->size : image_size(backing);
		image_close(backing);
	}
	c->size = a->size;
	c->overwrite = true;    /* as qemu-img does; one in use is refused before */
	c->fd = dup(a->file[0].fd);
	r = image_create(a->file[0].path, c, err);
	if (r)
		return r;
	if (!a->quiet) {
		disk_print(stdout, a->file[0].path);
		printf(": %s, %s (%llu bytes)\n", c->format, disk_size_words(a->size, words, sizeof(words)),
			(unsigned long long)a->size);
	}
	return 0;
}

/* ---- resize ---- */

int resize_prepare(struct disk_args *a, struct error *err)
{
	const char *size = a->file[1].path;
	int r = 0;

	a->sign = *size == '+' ? 1 : *size == '-' ? -1 : 0;
	if (parse_size(size + !!a->sign, &a->size))
		return error_set(err, EINVAL, "'%s' is no size: 10G is the new size, +1G adds to the old one", size);
	a->nr = 1;
	r = disk_parse_create(a, a->format, err);
	return r ? r : disk_open_file(a, 0, true, err);
}

static int new_size(struct disk_args *a, uint64_t old, struct error *err)
{
	if (a->sign > 0 && __builtin_add_overflow(old, a->size, &a->size))
		return error_set(err, EFBIG, "a disk can have at most 64T");
	if (a->sign < 0 && a->size >= old)
		return error_set(err, EINVAL, "the disk has only %llu bytes", (unsigned long long)old);
	if (a->sign < 0)
		a->size = old - a->size;
	return a->size ? 0 : error_set(err, EINVAL, "a disk needs 512 bytes or more");
}

/* What the backing file has beyond the old end must not show: where the format has no zero clusters, write. */
static int hide_backing(struct image *i, uint64_t from)
{
	uint64_t end = image_size(i);
	auto_free void *zeroes = calloc(1, ZERO_CHUNK);
	int r = zeroes ? image_zero(i, from, end - from, true) : -ENOMEM;

	while (!r && from < end) {
		struct image_status s;

		r = image_status(i, from, end - from, &s);
		if (!r && s.kind == EXT_HOLE) {
			s.len = MIN(s.len, ZERO_CHUNK);
			r = image_write(i, zeroes, s.len, from);
		}
		from += s.len;
	}
	return r;
}

int resize_work(struct disk_args *a, struct error *err)
{
	struct image *i;
	char words[32];
	uint64_t old;
	int r, e;

	r = disk_image(a, &i, 0, a->format, (struct image_how){ .alone = true }, err);
	if (r)
		return r;
	old = image_size(i);
	r = new_size(a, old, err);
	r = r ? r : image_resize(i, a->size, a->create.prealloc, a->shrink, err);
	if (!r && image_size(i) > old && image_backing_name(i)) {
		r = hide_backing(i, old);
		if (r)
			error_errno(err, -r, "cannot hide what the backing file has there");
	}
	a->size = image_size(i);
	e = image_close(i);
	if (!r && e)
		r = error_errno(err, -e, "'%s': cannot write its metadata", a->file[0].path);
	if (!r && !a->quiet)
		printf("%s (%llu bytes)\n", disk_size_words(a->size, words, sizeof(words)), (unsigned long long)a->size);
	return r;
}

/* ---- snapshot ---- */

/* "create NAME FILE" besides "-c NAME FILE" */
static int spelled_out(struct disk_args *a, struct error *err)
{
	static const char *const words[] = { "list", "create", "apply", "delete" };
	const char **to[] = { NULL, &a->snapshot_create, &a->snapshot_apply, &a->snapshot_delete };
	unsigned w = 0;

	while (w < ARRAY_LEN(words) && strcmp(a->file[0].path, words[w]))
		w++;
	if (a->nr == 1)
		return 0;
	if (w == ARRAY_LEN(words) || a->nr != (w ? 3 : 2))
		return error_set(err, EINVAL, "usage: vmm disk snapshot %s", a->command->usage);
	if (w)
		*to[w] = a->file[1].path;
	else
		a->snapshot_list = true;
	a->file[0] = a->file[a->nr - 1];
	a->nr = 1;
	return 0;
}

int snapshot_prepare(struct disk_args *a, struct error *err)
{
	int r = spelled_out(a, err), asked;

	if (r)
		return r;
	asked = a->snapshot_list + !!a->snapshot_create + !!a->snapshot_apply + !!a->snapshot_delete;
	if (asked > 1)
		return error_set(err, EINVAL, "one of list, create, apply and delete at a time");
	a->snapshot_list = a->snapshot_list || !asked;
	return disk_open_file(a, 0, !a->snapshot_list, err);
}

void snapshot_table(const struct image_snapshot *list, unsigned n)
{
	if (!n)
		return;
	printf("%-9s %-16s %8s %20s %16s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK");
	for (unsigned k = 0; k < n; k++) {
		time_t at = (time_t)(list[k].at_ns / 1000000000);
		uint64_t clock = list[k].vm_clock_ns / 1000000;
		char size[32], date[32] = "?";
		struct tm tm;

		if (localtime_r(&at, &tm))
			strftime(date, sizeof(date), "%Y-%m-%d %H:%M:%S", &tm);
		disk_print(stdout, list[k].id);
		printf("%*s ", (int)(9 - MIN(strlen(list[k].id), 9)), "");
		disk_print(stdout, list[k].name);
		printf("%*s %8s %20s     %02u:%02u:%02u.%03u\n", (int)(16 - MIN(strlen(list[k].name), 16)), "",
			disk_size_words(list[k].vm_state, size, sizeof(size)), date, (unsigned)(clock / 3600000),
			(unsigned)(clock / 60000 % 60), (unsigned)(clock / 1000 % 60), (unsigned)(clock % 1000));
	}
}

static int list_snapshots(struct disk_args *a, struct image *i, struct error *err)
{
	auto_free struct image_snapshot *list = NULL;
	unsigned n;
	int r = image_snapshots(i, &list, &n, err);

	if (!r && !a->json) {
		snapshot_table(list, n);
	} else if (!r) {
		struct facts *f = facts_new();
		auto_free char *text = NULL;

		snapshot_facts(f, list, n);
		text = facts_text(f);
		printf("%s\n", text ? text : "{}");
		facts_free(f);
	}
	return r;
}

int snapshot_work(struct disk_args *a, struct error *err)
{
	struct image *i;
	int r, e;

	r = disk_image(a, &i, 0, a->format, (struct image_how){ .readonly = a->snapshot_list, .alone = true }, err);
	if (r)
		return r;
	if (a->snapshot_list)
		r = list_snapshots(a, i, err);
	else if (a->snapshot_create)
		r = image_snapshot_create(i, a->snapshot_create, err);
	else if (a->snapshot_apply)
		r = image_snapshot_apply(i, a->snapshot_apply, err);
	else
		r = image_snapshot_delete(i, a->snapshot_delete, err);
	if (r && !err->msg[0])
		error_errno(err, -r, "'%s': cannot change its snapshots", a->file[0].path);
	e = image_close(i);
	return !r && e ? error_errno(err, -e, "'%s': cannot write its metadata", a->file[0].path) : r;
}
