/*
 * Images for tools: opening one with its backing chain, and every request done in place. The thread that
 * calls waits; formats and their caches are the same as under a guest.
 */
#include "vmm/image.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "format.h"

#define FILL_CHUNK (64u << 10)

static const struct format_ops *const formats[] = {
	&raw_format,
	&qcow2_format,
	&vdi_format,
	&vmdk_format,
	&vhd_format,
	&vhdx_format,
};

/* ---- the table of formats ---- */

/* What other tools call a format. */
static const struct {
	const char *alias, *name;
} aliases[] = {
	{ "vpc", "vhd" },
};

static const struct format_ops *find_format(const char *name)
{
	for (size_t n = 0; n < ARRAY_LEN(aliases); n++)
		if (!strcmp(aliases[n].alias, name))
			name = aliases[n].name;
	for (size_t n = 0; n < ARRAY_LEN(formats); n++)
		if (!strcmp(formats[n]->name, name))
			return formats[n];
	return NULL;
}

const char *const *image_formats(void)
{
	static const char *names[ARRAY_LEN(formats) + 1];

	for (size_t n = 0; n < ARRAY_LEN(formats); n++)
		names[n] = formats[n]->name;
	return names;
}

static bool can_write(const struct format_ops *fmt)
{
	return fmt->alloc || !fmt->map;
}

bool image_can_write(const char *format)
{
	const struct format_ops *fmt = find_format(format);

	return fmt && can_write(fmt);
}

bool image_can_create(const char *format)
{
	const struct format_ops *fmt = find_format(format);

	return fmt && fmt->create;
}

const char *image_guess(const void *head, size_t n)
{
	for (size_t f = 0; f < ARRAY_LEN(formats); f++)
		if (formats[f]->looks && formats[f]->looks(head, n))
			return formats[f]->name;
	return "raw";
}

static int unknown_format(const char *name, struct error *err)
{
	char list[128] = "";
	size_t at = 0;

	for (size_t n = 0; n < ARRAY_LEN(formats); n++)
		at += (size_t)snprintf(list + at, sizeof(list) - at, "%s%s", n ? ", " : "", formats[n]->name);
	return error_set(err, EINVAL, "there is no disk format '%s': one of %s", name, list);
}

/* ---- opening ---- */

static int open_file(struct image *i, const struct image_how *how, struct error *err)
{
	int r = how->fd > 0 ? file_adopt(&i->file, how->fd, i->path, how->readonly, err)
			    : file_open(&i->file, i->path, how->readonly, how->direct, err);

	if (!r && !how->share)
		r = lock_image(i->file.meta_fd, i->path, how->readonly, err);
	if (r)
		return r;
	r = file_prepare(&i->file, err);
	if (r)
		error_prefix(err, "'%s': ", i->path);
	return r;
}

static bool has_scheme(const char *name)
{
	size_t n = strcspn(name, ":/");

	return name[n] == ':';
}

/* The directory an image lies in, resolved; "from/..": not needed, realpath() sees to it. */
static int directory_of(const char *path, char *out)
{
	char copy[PATH_MAX];
	char *slash;

	if (snprintf(copy, sizeof(copy), "%s", path) >= (int)sizeof(copy))
		return -ENAMETOOLONG;
	slash = strrchr(copy, '/');
	if (slash)
		slash[slash == copy] = 0;
	return realpath(slash ? copy : ".", out) ? 0 : -errno;
}

/* name as a path under base, where it is one in words; what it leads to is openat2()'s to confine. */
static const char *below(const char *name, const char *from_dir, const char *base, char *out, size_t room)
{
	size_t n = strlen(base);

	if (snprintf(out, room, "%s%s%s", *name == '/' ? "" : from_dir, *name == '/' ? "" : "/", name) >= (int)room)
		return NULL;
	if (!strcmp(base, "/"))
		return out + 1;
	return !strncmp(out, base, n) && out[n] == '/' ? out + n + 1 : NULL;
}

static int open_below(const char *dir, const char *name, const char *from, struct error *err)
{
	char from_dir[PATH_MAX], base[PATH_MAX], path[PATH_MAX * 2];
	const char *rest;
	int fd;

	if (directory_of(from, from_dir) || !realpath(dir, base))
		return error_errno(err, errno, "backing=%s", dir);
	rest = below(name, from_dir, base, path, sizeof(path));
	if (!rest)
		return error_set(err, EACCES, "its backing file '%s' does not lie under '%s' (backing=DIR names another directory)",
			name, base);
	fd = confined_open(base, rest);
	if (fd < 0)
		return error_errno(err, -fd, "cannot open its backing file '%s' under '%s' (no symbolic links, nothing outside)",
			name, base);
	return fd;
}

/* A chain shows its guest what the first image's owner could read anyway, or what everybody may. */
static int check_owner(int fd, int first, const char *name, struct error *err)
{
	struct stat st, own;

	if (fstat(fd, &st) || fstat(first, &own))
		return error_errno(err, errno, "cannot look at its backing file");
	if (st.st_uid != own.st_uid && !(st.st_mode & S_IROTH))
		return error_set(err, EACCES, "its backing file '%s' belongs to another user and is not readable by all",
			name);
	return 0;
}

int image_open_backing_file(const char *dir, const char *name, const char *from, const char *first_path, int first,
	struct error *err)
{
	char own[PATH_MAX];
	int fd, r;

	if (has_scheme(name))
		return error_set(err, EINVAL, "its backing file '%s' is not a plain file name", name);
	if (!strcmp(dir, "allow")) {
		r = directory_of(first_path, own);
		if (r)
			return error_errno(err, -r, "cannot find the directory of '%s'", first_path);
		dir = own;
	}
	fd = open_below(dir, name, from, err);
	r = fd < 0 ? fd : check_owner(fd, first, name, err);
	if (r && fd >= 0)
		close(fd);
	return r ? r : fd;
}

static int check_loop(int fd, struct image *const *chain, unsigned n, struct error *err)
{
	struct stat st, other;

	if (n >= IMAGE_CHAIN_MAX)
		return error_set(err, ELOOP, "a backing chain of more than %u images", IMAGE_CHAIN_MAX);
	if (fstat(fd, &st))
		return error_errno(err, errno, "cannot look at its backing file");
	for (unsigned k = 0; k < n; k++)
		if (!fstat(chain[k]->file.fd, &other) && other.st_dev == st.st_dev && other.st_ino == st.st_ino)
			return error_set(err, ELOOP, "its backing chain leads back to '%s'", chain[k]->path);
	return 0;
}

static int open_one(struct image **ret, const char *path, const struct image_how *how, struct error *err);

/* A backing file is named from where the image lies that names it. In words only: a sandboxed tool cannot look. */
static char *beside(const char *from, const char *name)
{
	const char *slash = strrchr(from, '/');
	int n = *name == '/' || !slash ? 0 : (int)(slash - from + 1);
	char *path;

	return asprintf(&path, "%.*s%s", n, from, name) < 0 ? NULL : path;
}

/* The next image of the chain, 0 with *ret NULL where there is none. */
static int open_backing(struct image **ret, struct image *const *chain, unsigned n, const struct image_how *how,
	struct error *err)
{
	const struct image *i = chain[n - 1];
	const char *name = i->backing_name, *format = i->backing_format;
	struct image_how next = { .format = format, .readonly = true, .direct = how->direct, .share = how->share,
		.backing_dir = how->backing_dir, .opener = how->opener };
	auto_free char *path = NULL;
	int fd, r;

	*ret = NULL;
	if (!name || how->alone)
		return 0;
	if (!how->backing_dir && !how->opener)
		return error_set(err, EACCES, "'%s' has the backing file '%s': backing=allow opens it if it lies beside the image, "
			"backing=DIR if it lies under DIR", i->path, name);
	if (!format)
		return error_set(err, EINVAL, "'%s' does not say which format its backing file '%s' has: "
			"'vmm disk rebase -u -b %s -F FORMAT %s' says it", i->path, name, name, i->path);
	fd = how->opener ? how->opener->open(how->opener, name, i->path, err)
			 : image_open_backing_file(how->backing_dir, name, i->path, chain[0]->path, chain[0]->file.fd, err);
	r = fd < 0 ? fd : check_loop(fd, chain, n, err);
	if (r) {
		error_prefix(err, "'%s': ", i->path);
		if (fd >= 0)
			close(fd);
		return r;
	}
	next.fd = fd;
	path = beside(i->path, name);
	if (!path) {
		close(fd);
		return error_set(err, ENOMEM, "out of memory");
	}
	return open_one(ret, path, &next, err);
}

static int open_one(struct image **ret, const char *path, const struct image_how *how, struct error *err)
{
	const struct format_ops *fmt = find_format(how->format ? how->format : "raw");
	struct image *i;
	int r;

	if (!fmt || (!how->readonly && !can_write(fmt))) {
		if (how->fd > 0)
			close(how->fd);
		return !fmt ? unknown_format(how->format, err)
			    : error_set(err, EROFS, "'%s': format %s can only be read here: add ro, or convert it "
				"('vmm disk convert')", path, fmt->name);
	}
	i = calloc(1, sizeof(*i));
	if (!i) {
		if (how->fd > 0)
			close(how->fd);
		return error_set(err, ENOMEM, "out of memory");
	}
	i->fmt = fmt;
	i->blocking = true;
	i->file.fd = i->file.meta_fd = -1;
	i->path = strdup(path);
	if (!i->path && how->fd > 0)
		close(how->fd);
	r = i->path ? open_file(i, how, err) : error_set(err, ENOMEM, "out of memory");
	if (!r) {
		r = fmt->open(i, how, err);
		if (!r && !how->readonly && i->cluster && i->cluster < i->file.align)
			/* A block of the host's would be data and metadata at once, written by two ways. */
			r = error_set(err, EINVAL, "cache=none needs clusters of %u bytes or more here, for O_DIRECT: they have %u "
				"(cache=writeback takes them)", i->file.align, i->cluster);
		if (!r && how->snapshot)
			r = fmt->use_snapshot ? fmt->use_snapshot(i, how->snapshot, err)
				: error_set(err, EOPNOTSUPP, "format %s has no internal snapshots", fmt->name);
		if (r)
			error_prefix(err, "'%s': ", path);
	}
	if (r) {
		i->file.readonly = true;        /* nothing to write out */
		image_close(i);
		return r;
	}
	*ret = i;
	return 0;
}

int image_open(struct image **ret, const char *path, const struct image_how *how, struct error *err)
{
	struct image *chain[IMAGE_CHAIN_MAX + 1];
	struct error own;
	unsigned n = 1;
	int r;

	err = err ? err : &own;
	r = open_one(&chain[0], path, how, err);
	if (r)
		return r;
	for (;; n++) {
		struct image *next;

		r = open_backing(&next, chain, n, how, err);
		if (r || !next)
			break;
		chain[n - 1]->backing = next;
		next->depth = n;
		chain[n] = next;
	}
	if (r) {
		image_close(chain[0]);
		return r;
	}
	*ret = chain[0];
	return 0;
}

/* A file without a name in dir, or -errno. */
static int unlinked_in(const char *dir)
{
	char path[PATH_MAX];
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR))
		return fd >= 0 ? fd : -errno;
	snprintf(path, sizeof(path), "%s/vmm-overlay-XXXXXX", dir);     /* a file system that cannot */
	fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		return -errno;
	unlink(path);
	return fd;
}

static int unlinked_file(struct error *err)
{
	const char *dir = getenv("TMPDIR");
	int fd;

	if (dir && *dir)
		fd = unlinked_in(dir);
	else if ((fd = unlinked_in(dir = "/var/tmp")) < 0)
		fd = unlinked_in(dir = "/tmp");
	return fd < 0 ? error_errno(err, -fd, "no room for throw-away writes in '%s' (TMPDIR names another directory)", dir)
		      : fd;
}

int image_overlay(struct image **image, struct error *err)
{
	struct image *base = *image, *top;
	/* The name is only there so that the format knows that holes are not zeroes. */
	struct image_create c = { .format = "qcow2", .size = base->size, .backing = "base", .backing_format = "raw" };
	struct image_how how = { .format = "qcow2", .alone = true };
	int fd = unlinked_file(err), r;

	if (fd < 0)
		return fd;
	c.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	how.fd = fd;
	r = c.fd < 0 ? error_errno(err, errno, "throw-away writes") : image_create("throw-away writes", &c, err);
	if (r) {
		close(fd);
		return r;
	}
	r = image_open(&top, "throw-away writes", &how, err);
	if (r)
		return r;
	top->backing = base;
	for (struct image *i = base; i; i = i->backing)
		i->depth++;
	*image = top;
	return 0;
}

static int close_one(struct image *i)
{
	int r = 0;

	i->blocking = true;
	if (i->fmt->gather && !i->file.readonly)
		r = image_flush(i);
	if (i->fmt->close)
		i->fmt->close(i);
	file_close(&i->file);
	plan_clear(&i->plan);
	free(i->backing_name);
	free(i->backing_format);
	free(i->z_data);
	free(i->path);
	free(i);
	return r;
}

int image_close(struct image *i)
{
	int r = 0;

	while (i) {
		struct image *next = i->backing;
		int e = close_one(i);

		r = r ? r : e;
		i = next;
	}
	return r;
}

/* ---- what it is ---- */

uint64_t image_size(const struct image *i)
{
	return i->size;
}

const char *image_path(const struct image *i)
{
	return i->path;
}

const char *image_format(const struct image *i)
{
	return i->fmt->name;
}

bool image_readonly(const struct image *i)
{
	return i->file.readonly;
}

uint32_t image_cluster(const struct image *i)
{
	return i->cluster;
}

struct image *image_backing(const struct image *i)
{
	return i->backing;
}

const char *image_backing_name(const struct image *i)
{
	return i->backing_name;
}

const char *image_backing_format(const struct image *i)
{
	return i->backing_format;
}

uint64_t image_disk_usage(const struct image *i)
{
	struct stat st;

	return fstat(i->file.fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

void image_describe(const struct image *i, struct facts *f)
{
	if (i->fmt->describe)
		i->fmt->describe(i, f);
}

int image_corrupt(struct image *i, const char *fmt, ...)
{
	char text[200];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (!i->corrupt)
		log_guest(&i->limit, "'%s' is corrupt: %s; it is not changed any more ('vmm disk check' tells more)",
			i->path, text);
	i->corrupt = true;
	return -EIO;
}

/* ---- the map ---- */

int image_map(struct image *i, uint64_t off, uint64_t len, struct extent *e, struct image **owner)
{
	for (;;) {
		int r = 0;

		*owner = i;
		if (off >= i->size) {   /* a backing image may be shorter than what it backs */
			*e = (struct extent){ .kind = EXT_ZERO, .len = len };
			return 0;
		}
		len = MIN(len, i->size - off);
		if (i->fmt->map)
			r = i->fmt->map(i, off, len, e);
		else
			*e = (struct extent){ .kind = EXT_DATA, .len = len, .pos = off, .file = &i->file };
		len = r ? len : MIN(len, e->len);       /* what is below holds only as far as the hole above */
		e->len = len;
		if (r || e->kind != EXT_HOLE || !i->backing)
			return r;
		i = i->backing;
	}
}

/* Where the file has a hole the host says so: it reads as zeroes. Else the stretch ends where a hole begins. */
static void look_for_hole(struct image *i, struct extent *e, uint64_t len)
{
	int fd = e->file->meta_fd;
	off_t next;

	e->len = MIN(e->len, len);
	if (e->file->blockdev || e->pos > INT64_MAX - e->len)
		return;
	if (i->data_file != e->file || e->pos < i->data_from || e->pos >= i->data_to) {
		next = lseek(fd, (off_t)e->pos, SEEK_DATA);
		if (next < 0 && errno != ENXIO)
			return;
		if (next < 0 || (uint64_t)next > e->pos) {
			e->kind = EXT_ZERO;
			if (next >= 0)
				e->len = MIN(e->len, (uint64_t)next - e->pos);
			return;
		}
		next = lseek(fd, (off_t)e->pos, SEEK_HOLE);
		if (next < 0 || (uint64_t)next <= e->pos)
			return;
		i->data_file = e->file;
		i->data_from = e->pos;
		i->data_to = (uint64_t)next;
	}
	e->len = MIN(e->len, i->data_to - e->pos);
}

static int find_piece(struct image *i, uint64_t off, uint64_t len, bool holes, struct image_piece *p)
{
	struct image *owner;
	struct extent e;
	int r;

	if (off >= i->size || !len)
		return -EINVAL;
	len = MIN(len, i->size - off);
	r = image_map(i, off, len, &e, &owner);
	if (r)
		return r;
	if (e.kind == EXT_DATA && (holes || !owner->fmt->map))
		look_for_hole(i, &e, len);
	*p = (struct image_piece){ .kind = e.kind, .depth = owner->depth - i->depth, .len = MIN(e.len, len), .host = e.pos,
		.owner = owner, .file = e.file, .csize = e.csize, .skip = e.skip };
	return 0;
}

int image_piece(struct image *i, uint64_t off, uint64_t len, struct image_piece *p)
{
	return find_piece(i, off, len, true, p);
}

int image_status(struct image *i, uint64_t off, uint64_t len, struct image_status *s)
{
	struct image_piece p;
	int r = find_piece(i, off, len, false, &p);

	if (!r)
		*s = (struct image_status){ .kind = p.kind, .len = p.len, .host = p.host, .depth = p.depth };
	return r;
}

static int have_room(void **buf, size_t *room, size_t len)
{
	if (len <= *room)
		return 0;
	free(*buf);
	*buf = malloc(len);
	*room = *buf ? len : 0;
	return *buf ? 0 : -ENOMEM;
}

int image_fetch(const struct image_piece *p, struct image_scratch *s, void *buf, size_t len)
{
	const struct image *i = p->owner;
	bool whole = !p->skip && len == i->cluster;
	int r;

	if (p->kind == EXT_DATA)
		return meta_read(p->file, buf, len, p->host);
	if (p->kind != EXT_COMPRESSED) {
		memset(buf, 0, len);
		return 0;
	}
	r = have_room(&s->z, &s->z_room, p->csize);
	if (!r)
		r = meta_read(p->file, s->z, p->csize, p->host);
	if (!r && whole)
		return i->fmt->decompress(i, s->z, p->csize, buf);
	if (!r)
		r = have_room(&s->cluster, &s->cluster_room, i->cluster);
	if (!r)
		r = i->fmt->decompress(i, s->z, p->csize, s->cluster);
	if (!r)
		memcpy(buf, (uint8_t *)s->cluster + p->skip, len);
	return r;
}

void image_scratch_free(struct image_scratch *s)
{
	free(s->z);
	free(s->cluster);
	*s = (struct image_scratch){ 0 };
}

/* ---- reading ---- */

static int read_compressed(struct image *i, const struct extent *e, void *buf, size_t len)
{
	auto_free uint8_t *z = NULL;
	int r;

	if (!i->z_data)
		i->z_data = malloc(i->cluster);
	if (!i->z_data)
		return -ENOMEM;
	if (!i->z_valid || i->z_pos != e->pos) {
		i->z_valid = false;
		z = malloc(e->csize);
		r = z ? meta_read(e->file, z, e->csize, e->pos) : -ENOMEM;
		if (!r)
			r = i->fmt->decompress(i, z, e->csize, i->z_data);
		if (r)
			return r;
		i->z_valid = true;
		i->z_pos = e->pos;
	}
	memcpy(buf, (uint8_t *)i->z_data + e->skip, len);
	return 0;
}

static int check_range(const struct image *i, uint64_t off, uint64_t len)
{
	return off > i->size || len > i->size - off ? -EINVAL : 0;
}

/* Also past the end of the disk, where its last cluster goes on: zeroes. */
static int read_any(struct image *i, uint8_t *buf, uint64_t len, uint64_t off)
{
	while (len) {
		struct image *owner;
		struct extent e;
		uint64_t n;
		int r = image_map(i, off, len, &e, &owner);

		if (r)
			return r;
		n = MIN(e.len, len);
		if (e.kind == EXT_DATA)
			r = meta_read(e.file, buf, n, e.pos);
		else if (e.kind == EXT_COMPRESSED)
			r = read_compressed(owner, &e, buf, n);
		else
			memset(buf, 0, n);
		if (r)
			return r;
		buf += n;
		off += n;
		len -= n;
	}
	return 0;
}

int image_read(struct image *i, void *buf, size_t len, uint64_t off)
{
	int r = check_range(i, off, len);

	return r ? r : read_any(i, buf, len, off);
}

/* ---- writing ---- */

bool image_reads_zero(struct image *i, uint64_t off, uint64_t end)
{
	while (off < end) {
		struct image *owner;
		struct extent e;

		if (image_map(i, off, end - off, &e, &owner) || (e.kind != EXT_ZERO && e.kind != EXT_HOLE))
			return false;
		off += e.len;
	}
	return true;
}

/* What is read at [from, to) now goes to the new space at pos. */
static int fill(struct image *i, const struct alloc *a, uint64_t from, uint64_t to)
{
	auto_free uint8_t *buf = NULL;
	int r = 0;

	if (from >= to)
		return 0;
	if (image_reads_zero(i, from, to))
		return a->blank ? 0 : meta_zero(&i->file, a->pos + from - a->off, to - from);
	buf = malloc(FILL_CHUNK);
	if (!buf)
		return -ENOMEM;
	while (from < to && !r) {
		uint64_t n = MIN(to - from, FILL_CHUNK);

		r = read_any(i, buf, n, from);
		if (!r)
			r = meta_write(&i->file, buf, n, a->pos + (from - a->off));
		from += n;
	}
	return r;
}

static int write_data(struct image *i, const uint8_t *buf, uint64_t len, uint64_t off)
{
	while (len) {
		struct alloc a = { 0 };
		int r = i->fmt->alloc(i, off, len, &a);

		if (r)
			return r == -EAGAIN || r == -EBUSY ? -EIO : r;
		if (a.fresh)
			r = fill(i, &a, a.fill_off, off);
		if (!r)
			r = meta_write(&i->file, buf, a.len, a.pos);
		if (!r && a.fresh)
			r = fill(i, &a, off + a.len, a.fill_end);
		if (a.fresh && r)
			i->fmt->drop(i, &a);
		else if (a.fresh)
			i->fmt->link(i, &a);
		if (r)
			return r;
		buf += a.len;
		off += a.len;
		len -= a.len;
	}
	return 0;
}

static int check_change(const struct image *i, uint64_t off, uint64_t len)
{
	return i->file.readonly ? -EROFS : i->corrupt ? -EIO : check_range(i, off, len);
}

int image_write(struct image *i, const void *buf, size_t len, uint64_t off)
{
	int r = check_change(i, off, len);

	if (r)
		return r;
	return i->fmt->map ? write_data(i, buf, len, off) : meta_write(&i->file, buf, len, off);
}

static int write_zeroes(struct image *i, uint64_t off, uint64_t len)
{
	static const uint8_t zeroes[FILL_CHUNK];
	int r = 0;

	while (len && !r) {
		uint64_t n = MIN(len, FILL_CHUNK);

		if (!image_reads_zero(i, off, off + n))
			r = write_data(i, zeroes, n, off);
		off += n;
		len -= n;
	}
	return r;
}

static int punch(struct image *i, uint64_t off, uint64_t len, enum punch_kind kind)
{
	while (len) {
		uint64_t done = 0, part = 0;
		int r = i->fmt->punch ? i->fmt->punch(i, off, len, kind, &done, &part) : 0;

		if (!i->fmt->punch)
			part = len;
		if (!r && !done && kind != PUNCH_DISCARD)
			r = write_zeroes(i, off, MIN(part, len));
		if (r)
			return r;
		done = done ? done : MIN(part, len);
		off += done;
		len -= done;
	}
	return 0;
}

int image_zero(struct image *i, uint64_t off, uint64_t len, bool unmap)
{
	int r = check_change(i, off, len);

	if (r || !len)
		return r;
	if (i->fmt->map)
		return punch(i, off, len, unmap ? PUNCH_UNMAP : PUNCH_ZERO);
	if (unmap && !meta_hole(&i->file, off, len))
		return 0;
	return meta_zero(&i->file, off, len);
}

int image_discard(struct image *i, uint64_t off, uint64_t len)
{
	int r = check_change(i, off, len);

	if (r || !len)
		return r;
	return i->fmt->map ? punch(i, off, len, PUNCH_DISCARD) : meta_punch(&i->file, off, len);
}

int image_write_compressed(struct image *i, const void *cluster, uint64_t off)
{
	int r = check_change(i, off, 0);

	if (r)
		return r;
	return i->fmt->write_compressed ? i->fmt->write_compressed(i, cluster, off) : -EOPNOTSUPP;
}

size_t image_compress(const struct image *i, const void *cluster, void *z)
{
	return i->fmt->compress(i, cluster, z);
}

bool image_compresses(const struct image *i)
{
	return i->fmt->compress;
}

int image_write_packed(struct image *i, void *z, size_t n, uint64_t off)
{
	int r = check_change(i, off, 0);

	return r ? r : i->fmt->write_packed(i, z, n, off);
}

/* ---- metadata ---- */

int image_write_metadata(struct image *i)
{
	int r;

	assert(i->blocking && !i->gathering);
	i->gathering = true;
	i->plan.no_barriers = i->unsafe;
	r = i->fmt->gather(i, &i->plan);
	if (!r)
		r = plan_run(&i->plan, &i->file);
	plan_clear(&i->plan);
	i->fmt->gathered(i, r);
	i->z_valid = false;
	i->gathering = false;
	i->reclaimable = !r && i->fmt->reclaim && i->fmt->reclaim(i);
	return r;
}

int image_flush(struct image *i)
{
	int r;

	if (i->file.readonly)
		return 0;
	if (!i->fmt->gather)
		return i->unsafe ? 0 : meta_sync(&i->file);
	do
		r = i->corrupt && !i->marking ? 0 : image_write_metadata(i);
	while (!r && i->reclaimable && !i->corrupt);
	return r || i->unsafe ? r : meta_sync(&i->file);
}

/* ---- made, changed, checked ---- */

static int open_new(struct host_file *f, const char *path, const struct image_create *c, struct error *err)
{
	int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOCTTY | (c->overwrite ? 0 : O_EXCL);
	int fd = c->fd > 0 ? c->fd : open(path, flags, 0644), r;
	struct stat st;

	if (fd < 0 && errno == EEXIST)
		return error_set(err, EEXIST, "'%s' is there already", path);
	if (fd < 0)
		return error_errno(err, errno, "cannot make '%s'", path);
	r = file_adopt(f, fd, path, false, err);
	if (!r)
		r = lock_image(f->meta_fd, path, false, err);
	/* Not where it is empty: ext4 takes any truncation for a replacement, and writes the file out when it is closed. */
	if (!r && !f->blockdev && (fstat(fd, &st) || (st.st_size && ftruncate(fd, 0))))
		r = error_errno(err, errno, "cannot empty '%s'", path);
	if (!r)
		r = file_prepare(f, err);
	return r;
}

int image_create(const char *path, const struct image_create *c, struct error *err)
{
	const struct format_ops *fmt = find_format(c->format ? c->format : "raw");
	struct host_file f = { .fd = -1, .meta_fd = -1 };
	struct image_create own = *c;
	struct error mine;
	int r;

	err = err ? err : &mine;
	if (!fmt || !fmt->create) {
		if (c->fd > 0)
			close(c->fd);
		return !fmt ? unknown_format(c->format, err)
			    : error_set(err, EOPNOTSUPP, "images of format %s cannot be made, only read", fmt->name);
	}
	own.size = (c->size + SECTOR - 1) / SECTOR * SECTOR;
	if (own.size > IMAGE_SIZE_MAX || own.size < c->size)
		r = error_set(err, EFBIG, "a disk can have at most 64T");
	else
		r = open_new(&f, path, c, err);
	if (!r) {
		r = fmt->create(&f, &own, err);
		if (r)
			error_prefix(err, "'%s': ", path);
		if (r && !c->overwrite && c->fd <= 0)
			unlink(path);
	} else if (c->fd > 0 && f.fd < 0) {
		close(c->fd);
	}
	file_close(&f);
	return r;
}

static int not_here(const struct image *i, const char *what, struct error *err)
{
	return error_set(err, EOPNOTSUPP, "'%s': format %s has no %s", i->path, i->fmt->name, what);
}

static int writable(const struct image *i, struct error *err)
{
	if (i->file.readonly)
		return error_set(err, EROFS, "'%s' is open read-only", i->path);
	if (i->corrupt)
		return error_set(err, EIO, "'%s' is corrupt: 'vmm disk check --repair all' first", i->path);
	return 0;
}

int image_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, bool shrink, struct error *err)
{
	int r = writable(i, err);

	if (r)
		return r;
	if (!i->fmt->resize)
		return not_here(i, "changing of the size", err);
	size = (size + SECTOR - 1) / SECTOR * SECTOR;
	if (size > IMAGE_SIZE_MAX)
		return error_set(err, EFBIG, "a disk can have at most 64T");
	if (size < i->size && !shrink)
		return error_set(err, EINVAL, "'%s' has %llu bytes: %llu would cut it off (--shrink does)", i->path,
			(unsigned long long)i->size, (unsigned long long)size);
	r = i->fmt->resize(i, size, prealloc, err);
	return r ? r : image_flush(i);
}

int image_check(struct image *i, enum image_repair repair, struct image_check *c, struct error *err)
{
	int r = repair != REPAIR_NONE && i->file.readonly ? writable(i, err) : 0;

	if (r)
		return r;
	return i->fmt->check ? i->fmt->check(i, repair, c, err) : not_here(i, "metadata to check", err);
}

int image_snapshots(struct image *i, struct image_snapshot **list, unsigned *n, struct error *err)
{
	*list = NULL;
	*n = 0;
	return i->fmt->snapshots ? i->fmt->snapshots(i, list, n, err) : not_here(i, "internal snapshots", err);
}

static int change(struct image *i, int (*fn)(struct image *i, const char *arg, struct error *err), const char *arg,
	const char *what, struct error *err)
{
	int r = writable(i, err);

	if (r)
		return r;
	if (!fn)
		return not_here(i, what, err);
	r = fn(i, arg, err);
	i->z_valid = false;
	return r ? r : image_flush(i);
}

int image_snapshot_create(struct image *i, const char *name, struct error *err)
{
	return change(i, i->fmt->snapshot_create, name, "internal snapshots", err);
}

int image_snapshot_apply(struct image *i, const char *which, struct error *err)
{
	return change(i, i->fmt->snapshot_apply, which, "internal snapshots", err);
}

int image_snapshot_delete(struct image *i, const char *which, struct error *err)
{
	return change(i, i->fmt->snapshot_delete, which, "internal snapshots", err);
}

int image_set_backing(struct image *i, const char *name, const char *format, struct error *err)
{
	int r = writable(i, err);

	if (r)
		return r;
	if (!i->fmt->set_backing)
		return not_here(i, "backing files", err);
	return i->fmt->set_backing(i, name, format, err);
}
