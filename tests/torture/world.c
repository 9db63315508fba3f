/* An image, and beside it the plain bytes that it must contain. */
#include "torture.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "vmm/cleanup.h"

void broken(const struct world *w, const char *fmt, ...)
{
	va_list ap;

	fflush(stdout);
	fprintf(stderr, "BROKEN %s seed %llu: ", w->format, (unsigned long long)w->seed);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, " (image kept: %s, cluster %u, refcount bits %u, version %u, extended L2 %d, backing %s)\n", w->path,
		w->make.cluster, w->make.refcount_bits, w->make.version, w->make.extended_l2, w->base);
	_exit(1);
}

unsigned rnd(struct world *w, unsigned n)
{
	w->seed ^= w->seed << 13;
	w->seed ^= w->seed >> 7;
	w->seed ^= w->seed << 17;
	return (unsigned)(w->seed % n);
}

static void choose_qcow2(struct world *w)
{
	static const uint32_t clusters[] = { 512, 1024, 4096, 0, 0, 65536, 262144, 2u << 20 };
	static const unsigned bits[] = { 0, 0, 1, 2, 8, 16, 32, 64 };

	w->make.cluster = clusters[rnd(w, ARRAY_LEN(clusters))];
	w->make.refcount_bits = bits[rnd(w, ARRAY_LEN(bits))];
	w->make.extended_l2 = (!w->make.cluster || w->make.cluster >= 16384) && rnd(w, 3) == 0;
	w->make.zstd = rnd(w, 3) == 0;
	w->make.prealloc = rnd(w, 6) ? PREALLOC_OFF : PREALLOC_METADATA;
	if (rnd(w, 5) == 0 && !w->make.extended_l2 && !w->make.zstd) {
		w->make.version = 2;
		w->make.refcount_bits = 0;
	}
	if (rnd(w, 3) == 0)
		snprintf(w->base, sizeof(w->base), "%s/base", w->dir);
}

static void make_base(struct world *w)
{
	uint64_t size = rnd(w, 2) ? w->size : SECTOR * (1 + rnd(w, (unsigned)(w->size / SECTOR)));
	int fd = open(w->base, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	for (uint64_t at = 0; at < size; at += 8)
		if (at / 30000 % 2)
			*(uint64_t *)(w->data + at) = (uint32_t)(at * 0x9e3779b9u);     /* of write 0 */
	if (fd < 0 || write(fd, w->data, size) != (ssize_t)size)
		broken(w, "cannot write %s", w->base);
	close(fd);
	w->make.backing = "base";
	w->make.backing_format = "raw";
	w->make.prealloc = PREALLOC_OFF;
}

void world_new(struct world *w, const char *format, uint64_t seed)
{
	*w = (struct world){ .format = format, .seed = seed * 0x9e3779b97f4a7c15ull | 1, .dir = "/dev/shm/vmm-torture-XXXXXX" };
	if (!mkdtemp(w->dir)) {
		strcpy(w->dir, "/tmp/vmm-torture-XXXXXX");
		if (!mkdtemp(w->dir))
			broken(w, "no directory for images");
	}
	for (int k = 0; k < 8; k++)
		rnd(w, 2);
	snprintf(w->path, sizeof(w->path), "%s/disk", w->dir);
	w->data = calloc(1, DISK_MAX);
	w->size = rnd(w, 4) ? 2u << 20 : SECTOR * (100 + rnd(w, 4000));
	w->make = (struct image_create){ .format = format, .size = w->size };
	if (!strcmp(format, "qcow2"))
		choose_qcow2(w);
	if (*w->base)
		make_base(w);
}

void world_make(struct world *w)
{
	struct error err;

	if (image_create(w->path, &w->make, &err))
		broken(w, "create: %s", err.msg);
}

void world_free(struct world *w)
{
	unlink(w->path);
	if (*w->base)
		unlink(w->base);
	rmdir(w->dir);
	free(w->data);
	for (int k = 0; k < SNAPSHOTS; k++)
		free(w->snapshot[k].data);
}

int world_try_open(struct world *w, bool readonly, struct image **ret, struct error *err)
{
	struct image_how how = { .format = w->format, .readonly = readonly, .backing_dir = *w->base ? "allow" : NULL };

	return image_open(ret, w->path, &how, err);
}

struct image *world_open(struct world *w, bool readonly)
{
	struct image *i;
	struct error err;

	if (world_try_open(w, readonly, &i, &err))
		broken(w, "open: %s", err.msg);
	return i;
}

/* ---- operations ---- */

/* Each sector tells its place and the operation that wrote it. */
static void fill(struct world *w, uint64_t off, uint64_t len)
{
	for (uint64_t at = off; at < off + len; at += 8)
		*(uint64_t *)(w->data + at) = (uint64_t)w->ops << 32 | at / SECTOR;
}

static struct op_done do_range(struct world *w, struct image *i, enum op_kind kind)
{
	uint64_t sectors = w->size / SECTOR;
	uint64_t off = rnd(w, (unsigned)sectors), len = 1 + rnd(w, rnd(w, 8) ? 40 : 1200);
	struct op_done d = { .kind = kind, .off = off * SECTOR, .len = MIN(len, sectors - off) * SECTOR };
	static uint8_t was[DISK_MAX], is[DISK_MAX];

	if (kind == DO_WRITE) {
		fill(w, d.off, d.len);
		d.err = image_write(i, w->data + d.off, d.len, d.off);
	} else if (kind == DO_ZERO) {
		memset(w->data + d.off, 0, d.len);
		d.err = image_zero(i, d.off, d.len, rnd(w, 2));
	} else {        /* each discarded sector may keep its bytes, become zeroes, or show the backing image */
		memcpy(was, w->data + d.off, d.len);
		d.err = image_discard(i, d.off, d.len);
		d.err = d.err ? d.err : image_read(i, is, d.len, d.off);
		if (!d.err) {
			for (uint64_t at = 0; at < d.len && !*w->base && !w->unsure; at += SECTOR) {
				static const uint8_t none[SECTOR];

				if (memcmp(is + at, was + at, SECTOR) && memcmp(is + at, none, SECTOR))
					broken(w, "discard invented bytes at %llu", (unsigned long long)(d.off + at));
			}
			memcpy(w->data + d.off, is, d.len);
		}
	}
	w->unsure |= d.err != 0;
	return d;
}

static struct op_done do_snapshot(struct world *w, struct image *i)
{
	int k = (int)rnd(w, SNAPSHOTS), what = (int)rnd(w, 3);
	struct op_done d = { .kind = DO_SNAPSHOT };
	struct error err;

	if (!w->snapshot[k].there) {
		snprintf(w->snapshot[k].name, sizeof(w->snapshot[k].name), "snap%d-%u", k, w->ops);
		d.err = image_snapshot_create(i, w->snapshot[k].name, &err);
		if (d.err)      /* narrow refcounts, or a format without */
			return d;
		w->snapshot[k].there = true;
		w->snapshot[k].size = w->size;
		w->snapshot[k].data = w->snapshot[k].data ? w->snapshot[k].data : malloc(DISK_MAX);
		memcpy(w->snapshot[k].data, w->data, DISK_MAX);
	} else if (what == 0) {
		d.err = image_snapshot_delete(i, w->snapshot[k].name, &err);
		w->snapshot[k].there = d.err != 0;
	} else if (w->snapshot[k].size == w->size) {
		d.err = image_snapshot_apply(i, w->snapshot[k].name, &err);
		if (!d.err)
			memcpy(w->data, w->snapshot[k].data, DISK_MAX);
	}
	return d;
}

static struct op_done do_resize(struct world *w, struct image *i)
{
	uint64_t size = SECTOR * (uint64_t)(64 + rnd(w, DISK_MAX / SECTOR - 64));
	struct op_done d = { .kind = DO_RESIZE };
	struct error err;

	/* Growing over a backing image shows it again, or not: formats differ there with good reasons. */
	if (*w->base)
		return d;
	d.err = image_resize(i, size, PREALLOC_OFF, size < w->size, &err);
	if (!d.err) {
		if (size < w->size)
			memset(w->data + size, 0, w->size - size);
		w->size = size;
	}
	return d;
}

struct op_done world_op(struct world *w, struct image *i, bool structure)
{
	unsigned what = rnd(w, 100);

	w->ops++;
	if (structure && what >= 97)
		return do_resize(w, i);
	if (structure && what >= 92)
		return do_snapshot(w, i);
	if (what >= 84)
		return (struct op_done){ .kind = DO_FLUSH, .err = image_flush(i) };
	return do_range(w, i, what >= 76 ? DO_DISCARD : what >= 60 ? DO_ZERO : DO_WRITE);
}

/* ---- is it right? ---- */

void world_compare(struct world *w, struct image *i)
{
	static uint8_t is[DISK_MAX];

	if (image_size(i) != w->size)
		broken(w, "size %llu, not %llu", (unsigned long long)image_size(i), (unsigned long long)w->size);
	if (image_read(i, is, w->size, 0))
		broken(w, "it cannot be read");
	for (uint64_t at = 0; at < w->size; at += SECTOR)
		if (memcmp(is + at, w->data + at, SECTOR))
			broken(w, "sector %llu differs", (unsigned long long)(at / SECTOR));
}

static void complain(struct image_check *c, const char *text)
{
	if (c->words < 10)
		fprintf(stderr, "  check: %s\n", text);
}

void world_check(struct world *w, bool exact)
{
	struct image *i = world_open(w, true);
	struct image_check c = { .complain = exact ? complain : NULL };
	struct error err;
	int r = image_check(i, REPAIR_NONE, &c, &err);

	if (r && r != -EOPNOTSUPP)
		broken(w, "check: %s", err.msg);
	if (!r && (c.corruptions || c.errors))
		broken(w, "%llu corruptions, %llu errors", (unsigned long long)c.corruptions, (unsigned long long)c.errors);
	if (!r && exact && c.leaks)
		broken(w, "%llu leaks", (unsigned long long)c.leaks);
	image_close(i);
}

void world_repair(struct world *w)
{
	struct image_how how = { .format = w->format, .repair = true, .backing_dir = *w->base ? "allow" : NULL };
	struct image_check c = { 0 };
	struct error err;
	struct image *i;

	if (image_open(&i, w->path, &how, &err))
		broken(w, "open for repair: %s", err.msg);
	if (image_check(i, REPAIR_ALL, &c, &err) && err.code != EOPNOTSUPP)
		broken(w, "repair: %s", err.msg);
	if (image_close(i))
		broken(w, "close after repair");
	world_check(w, true);
}

int run_quietly(const char *const *argv)
{
	int status, null;
	pid_t pid = fork();

	if (!pid) {
		null = open("/dev/null", O_RDWR);
		dup2(getenv("TORTURE_LOUD") ? 2 : null, 1);
		execvp(argv[0], (char *const *)argv);
		_exit(127);
	}
	return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool have_qemu(void)
{
	static int here = -1;

	if (here < 0)
		here = run_quietly((const char *const[]){ "qemu-img", "--version", NULL }) == 0;
	return here;
}

void world_compare_qemu(struct world *w)
{
	static uint8_t is[DISK_MAX];
	const char *format = !strcmp(w->format, "vhd") ? "vpc" : w->format;
	char raw[140];
	int fd, r;

	r = !strcmp(format, "raw") ? 63 : run_quietly((const char *const[]){ "qemu-img", "check", "-q", "-f", format, w->path, NULL });
	if (r && r != 63)
		broken(w, "qemu-img check: status %d", r);
	snprintf(raw, sizeof(raw), "%s/raw", w->dir);
	if (run_quietly((const char *const[]){ "qemu-img", "convert", "-f", format, "-O", "raw", w->path, raw, NULL }))
		broken(w, "qemu-img convert");
	fd = open(raw, O_RDONLY | O_CLOEXEC);
	if (read(fd, is, DISK_MAX) != (ssize_t)w->size)
		broken(w, "qemu-img sees another size");
	close(fd);
	unlink(raw);
	if (memcmp(is, w->data, w->size))
		broken(w, "qemu-img reads other bytes");
}
