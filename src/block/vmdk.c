/*
 * VMDK (VMware, "Virtual Disk Format 5.0"), read only: sparse, compressed, flat and split images.
 *
 * How this works. A disk is one extent after another, each a whole file (flat), or a sparse file:
 *
 *      header  descriptor  redundant grain directory, its tables  grain directory, its tables  grains …
 *
 *      guest offset -> grain -> grain directory[grain / GTEs] -> grain table[grain % GTEs] -> sector of the grain
 *
 * Directories and tables start at any sector, so they are cached as the 4 KiB pages of the file they lie in. A compressed grain
 * begins with a marker (which sector of the disk it holds, how many bytes follow) that is read, and believed only
 * if it names the grain we came for. A stream has its directory at the end, where a footer, a second header, says.
 *
 * Extents are files of their own, a part of the image like its second half, and still a descriptor is hostile: only files beside it, named
 * after it, of the same owner are opened.
 */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "format.h"
#include "vmdk.h"

#define PAGE          4096u             /* what is cached of directories and tables */
#define PAGES         1024u             /* of them, over all extents */
#define MARKERS       256u
#define GRAIN_MIN     8u                /* sectors */
#define GRAIN_MAX     2048u
#define GTES_MAX      4096u
#define GD_AT_END     UINT64_MAX
#define FLAT_CLUSTER  (64u << 10)       /* for those who ask; nothing is allocated in a flat extent */

#define FLAG_NEWLINES   (1u << 0)
#define FLAG_REDUNDANT  (1u << 1)
#define FLAG_ZERO_GTE   (1u << 2)
#define FLAG_COMPRESSED (1u << 16)
#define FLAG_MARKERS    (1u << 17)
#define FLAGS_INCOMPATIBLE 0xffff0000u

enum { MARKER_EOS, MARKER_GT, MARKER_GD, MARKER_FOOTER };

/* All little-endian; offsets and sizes in sectors. */
struct sparse_header {
	uint8_t magic[4];
	uint32_t version, flags;
	uint64_t capacity, grain;
	uint64_t desc_off, desc_size;
	uint32_t gtes;
	uint64_t rgd_off, gd_off;
	uint64_t overhead;
	uint8_t unclean;
	uint8_t newlines[4];
	uint16_t compression;
	uint8_t pad[433];
} __attribute__((packed));

/* Before a grain: the first sector of the disk it holds and the bytes that follow at once. Else size is 0. */
struct marker {
	uint64_t val;
	uint32_t size;
	uint32_t type;
} __attribute__((packed));
#define GRAIN_HEAD offsetof(struct marker, type)

_Static_assert(sizeof(struct sparse_header) == SECTOR, "one sector");
_Static_assert(GRAIN_HEAD == 12, "as on disk");

/* Bytes everywhere, but where it says otherwise. */
struct vmdk_extent {
	struct vmdk_line line;
	uint64_t start, end;            /* of the guest's bytes */
	struct host_file *file;         /* image->file or own; NULL: VMDK_ZERO */
	struct host_file own;           /* fd -1: none */

	/* VMDK_SPARSE */
	uint32_t grain, gtes;
	uint64_t gts;                   /* entries of the grain directory */
	uint64_t gd, rgd;               /* rgd 0: no redundant one */
	uint64_t first;                 /* no grain lies below */
	bool zero_gte, compressed, unclean;
	uint32_t version;
	struct tables *pages, *markers;
};

struct vmdk {
	char create_type[32];
	unsigned n;
	struct vmdk_extent *x;
};

/* ---- the map ---- */

static struct vmdk_extent *find_extent(const struct vmdk *v, uint64_t off)
{
	unsigned from = 0, to = v->n - 1;

	while (from < to) {
		unsigned mid = (from + to + 1) / 2;

		if (off >= v->x[mid].start)
			from = mid;
		else
			to = mid - 1;
	}
	return &v->x[from];
}

/* Entry index of the table of u32 at file offset table; *n in: how many are wanted, out: how many lie there. */
static int entries(struct tables *pages, uint64_t table, uint64_t index, const uint32_t **ret, uint64_t *n)
{
	uint64_t at = table + index * sizeof(uint32_t);
	struct table *t;
	int r = tables_get(pages, at - at % PAGE, &t);

	if (r)
		return r;
	*ret = (const uint32_t *)((const uint8_t *)t->data + at % PAGE);
	*n = MIN(*n, (PAGE - at % PAGE) / sizeof(uint32_t));
	return 0;
}

/* How many of e[n] hold the same as the first. */
static uint64_t run_of_same(const uint32_t *e, uint64_t n)
{
	uint64_t k = 1;

	while (k < n && e[k] == e[0])
		k++;
	return k;
}

static bool gt_fits(const struct vmdk_extent *x, uint32_t sector)
{
	uint64_t off = (uint64_t)sector * SECTOR, len = (uint64_t)x->gtes * sizeof(uint32_t);

	return sector && off <= x->file->size && len <= x->file->size - off;
}

/* The grain table of directory entry nr: *gt its file offset, or 0: none, as for *run entries from nr on. */
static int find_gt(struct image *i, const struct vmdk_extent *x, uint64_t nr, uint64_t *gt, uint64_t *run)
{
	uint64_t n = x->gts - nr, one = 1;
	const uint32_t *e;
	uint32_t sector, second;
	int r = entries(x->pages, x->gd, nr, &e, &n);

	if (r)
		return r;
	sector = le32toh(e[0]);
	*run = sector ? 1 : run_of_same(e, n);
	if (sector && !gt_fits(x, sector) && x->rgd) {
		r = entries(x->pages, x->rgd, nr, &e, &one);
		if (r)
			return r;
		second = le32toh(e[0]);
		sector = second ? second : sector;
	}
	if (sector && !gt_fits(x, sector))
		return image_corrupt(i, "grain table %llu would lie at sector %u, outside the file", (unsigned long long)nr,
			sector);
	*gt = (uint64_t)sector * SECTOR;
	return 0;
}

/* Does the part of grain nr that is inside the disk lie in the file, if it starts at pos? */
static bool grain_fits(const struct vmdk_extent *x, uint64_t nr, uint64_t pos)
{
	uint64_t size = x->file->size, len = MIN(x->grain, x->end - x->start - nr * x->grain);

	return pos >= x->first && pos <= size && len <= size - pos;
}

static int outside(struct image *i, uint64_t nr, uint64_t pos)
{
	return image_corrupt(i, "grain %llu would lie at byte %llu, among the metadata or outside the file",
		(unsigned long long)nr, (unsigned long long)pos);
}

/* Grains from nr on whose entries are e[n]: how many of them follow each other in the file too. */
static uint64_t run_of_data(const struct vmdk_extent *x, uint64_t nr, const uint32_t *e, uint64_t n)
{
	uint64_t first = le32toh(e[0]), k = 1;

	while (k < n && le32toh(e[k]) == first + k * (x->grain / SECTOR) &&
		grain_fits(x, nr + k, (first + k * (x->grain / SECTOR)) * SECTOR))
		k++;
	return k;
}

static int map_compressed(struct image *i, const struct vmdk_extent *x, uint64_t nr, struct extent *e)
{
	uint64_t size = x->file->size, sector = nr * (x->grain / SECTOR);
	struct marker m;
	struct table *t;
	int r;

	if (e->pos < x->first || e->pos > size || size - e->pos < SECTOR)
		return outside(i, nr, e->pos);
	r = tables_get(x->markers, e->pos, &t);
	if (r)
		return r;
	memcpy(&m, t->data, sizeof(m));
	m.size = le32toh(m.size);
	if (le64toh(m.val) != sector)
		return image_corrupt(i, "the grain at byte %llu says that it holds sector %llu, not %llu",
			(unsigned long long)e->pos, (unsigned long long)le64toh(m.val), (unsigned long long)sector);
	if (!m.size || m.size > 2 * x->grain || m.size > size - e->pos - GRAIN_HEAD)
		return image_corrupt(i, "the grain at byte %llu would have %u bytes", (unsigned long long)e->pos, m.size);
	e->kind = EXT_COMPRESSED;
	e->csize = (uint32_t)GRAIN_HEAD + m.size;
	return 0;
}

static int map_sparse(struct image *i, const struct vmdk_extent *x, uint64_t off, uint64_t len, struct extent *e)
{
	uint64_t nr = off / x->grain, in = off % x->grain, idx = nr % x->gtes, gt = 0, run = 1, n = x->gtes - idx;
	const uint32_t *gte;
	uint32_t sector;
	int r = find_gt(i, x, nr / x->gtes, &gt, &run);

	if (r)
		return r;
	*e = (struct extent){ .kind = EXT_HOLE, .file = x->file };
	if (!gt) {
		e->len = MIN(len, (run * x->gtes - idx) * x->grain - in);
		return 0;
	}
	n = MIN(n, (x->end - x->start + x->grain - 1) / x->grain - nr);
	r = entries(x->pages, gt, idx, &gte, &n);
	if (r)
		return r;
	sector = le32toh(gte[0]);
	e->pos = (uint64_t)sector * SECTOR;
	if (!sector || (sector == 1 && x->zero_gte)) {
		e->kind = sector ? EXT_ZERO : EXT_HOLE;
		run = run_of_same(gte, n);
	} else if (x->compressed) {
		run = 1;
		e->skip = (uint32_t)in;
		r = map_compressed(i, x, nr, e);
	} else if (!grain_fits(x, nr, e->pos)) {
		r = outside(i, nr, e->pos);
	} else {
		e->kind = EXT_DATA;
		run = run_of_data(x, nr, gte, n);
		e->pos += in;
	}
	e->len = MIN(len, run * x->grain - in);
	return r;
}

static int vmdk_map(struct image *i, uint64_t off, uint64_t len, struct extent *e)
{
	struct vmdk_extent *x = find_extent(i->priv, off);

	len = MIN(len, x->end - off);
	off -= x->start;
	if (x->line.no_access) {
		log_guest(&i->limit, "'%s': a part of it that is NOACCESS was read", i->path);
		return -EIO;
	}
	if (x->line.type == VMDK_ZERO) {
		*e = (struct extent){ .kind = EXT_ZERO, .len = len };
		return 0;
	}
	x->file->home = i->file.home;
	if (x->line.type == VMDK_SPARSE)
		return map_sparse(i, x, off, len, e);
	*e = (struct extent){ .kind = EXT_DATA, .len = len, .pos = x->line.offset * SECTOR + off, .file = x->file };
	return 0;
}

/* ---- compressed grains ---- */

/* A zlib stream (RFC 1950) behind its marker. The last grain may end with the disk. */
static int vmdk_decompress(const struct image *i, const void *z, size_t n, void *out)
{
	const struct vmdk *v = i->priv;
	struct marker m = { 0 };
	z_stream s = { .next_in = (uint8_t *)z + GRAIN_HEAD, .next_out = out, .avail_out = v->x->grain };
	uint64_t off, got;
	int r;

	if (n <= GRAIN_HEAD)
		return -EIO;
	memcpy(&m, z, GRAIN_HEAD);
	if (le32toh(m.size) != n - GRAIN_HEAD || le64toh(m.val) > i->size / SECTOR)
		return -EIO;
	off = le64toh(m.val) * SECTOR;
	s.avail_in = (uInt)(n - GRAIN_HEAD);
	if (inflateInit(&s) != Z_OK)
		return -ENOMEM;
	r = inflate(&s, Z_FINISH);
	inflateEnd(&s);
	got = v->x->grain - s.avail_out;
	if (r != Z_STREAM_END || got < MIN(v->x->grain, i->size - off))
		return -EIO;
	memset((uint8_t *)out + got, 0, s.avail_out);
	return 0;
}

/* ---- opening: a sparse file ---- */

static int read_header(const struct host_file *f, uint64_t off, struct sparse_header *h, struct error *err)
{
	int r = meta_read(f, h, sizeof(*h), off);

	if (r)
		return error_errno(err, -r, "cannot read its header");
	if (!memcmp(h->magic, "COWD", 4))
		return error_set(err, EOPNOTSUPP, "it is a vmfsSparse extent of an ESX server (COWD): "
			"a copy as monolithicSparse can be read");
	if (memcmp(h->magic, "KDMV", 4))
		return error_set(err, EINVAL, "it is no VMDK image: neither 'KDMV' nor '" VMDK_MAGIC "' at its start");
	return 0;
}

/* A stream ends with a footer marker, the footer and an end marker, a sector each. h becomes the footer. */
static int read_footer(const struct host_file *f, struct sparse_header *h, struct error *err)
{
	struct marker before, after;
	uint64_t at = f->size - 3 * SECTOR;
	int r = f->size < 4 * SECTOR ? -EIO : meta_read(f, &before, sizeof(before), at);

	r = r ? r : meta_read(f, &after, sizeof(after), at + 2 * SECTOR);
	if (r || before.size || le32toh(before.type) != MARKER_FOOTER || after.val || after.size ||
		le32toh(after.type) != MARKER_EOS)
		return error_set(err, EINVAL, "it is cut off: a stream ends with a footer and an end marker, this one does not");
	r = read_header(f, at + SECTOR, h, err);
	if (!r && le64toh(h->gd_off) == GD_AT_END)
		r = error_set(err, EINVAL, "its footer does not say where the grain directory is");
	return r;
}

static int check_features(const struct sparse_header *h, struct error *err)
{
	uint32_t version = le32toh(h->version), flags = le32toh(h->flags);

	if (version < 1 || version > 3)
		return error_set(err, EOPNOTSUPP, "its header has version %u: 1 to 3 can be read", version);
	if (flags & FLAG_NEWLINES && memcmp(h->newlines, "\n \r\n", 4))
		return error_set(err, EINVAL, "it was damaged by a transfer as text (its line ends were changed)");
	if (flags & FLAGS_INCOMPATIBLE & ~(FLAG_COMPRESSED | FLAG_MARKERS))
		return error_set(err, EOPNOTSUPP, "its header has flags 0x%x: of the upper half only 0x30000 is known", flags);
	if (flags & FLAG_COMPRESSED && (!(flags & FLAG_MARKERS) || le16toh(h->compression) != 1))
		return error_set(err, EOPNOTSUPP, "its grains are compressed by method %u %s markers: deflate (1) with markers can be read",
			le16toh(h->compression), flags & FLAG_MARKERS ? "with" : "without");
	return 0;
}

static int check_grains(struct vmdk_extent *x, const struct sparse_header *h, struct error *err)
{
	uint64_t grain = le64toh(h->grain), capacity = le64toh(h->capacity), per_gt;
	uint32_t gtes = le32toh(h->gtes);

	if (grain < GRAIN_MIN || grain > GRAIN_MAX || grain & (grain - 1))
		return error_set(err, EINVAL, "its grains have %llu sectors: a power of two from %u to %u",
			(unsigned long long)grain, GRAIN_MIN, GRAIN_MAX);
	if (!gtes || gtes > GTES_MAX || gtes & (gtes - 1))
		return error_set(err, EINVAL, "its grain tables have %u entries: a power of two from 1 to %u", gtes, GTES_MAX);
	if (!capacity || capacity > IMAGE_SIZE_MAX / SECTOR)
		return error_set(err, EFBIG, "it has %llu sectors: a disk has 1 to 64T bytes", (unsigned long long)capacity);
	per_gt = grain * gtes;
	x->grain = (uint32_t)grain * SECTOR;
	x->gtes = gtes;
	x->gts = (capacity + per_gt - 1) / per_gt;
	return 0;
}

/* Bytes of a directory at this sector; 0: it does not fit into the file. */
static uint64_t directory(const struct vmdk_extent *x, uint64_t sector)
{
	uint64_t size = x->file->size, len = x->gts * sizeof(uint32_t);

	return sector && sector <= size / SECTOR && len <= size - sector * SECTOR ? sector * SECTOR : 0;
}

/* file, start, end and line are there. */
static int open_sparse(struct vmdk_extent *x, struct sparse_header *h, struct error *err)
{
	uint64_t sectors = x->file->size / SECTOR;
	uint32_t flags;
	int r;

	if (le64toh(h->gd_off) == GD_AT_END) {
		r = read_footer(x->file, h, err);
		if (r)
			return r;
	}
	r = check_features(h, err);
	if (!r)
		r = check_grains(x, h, err);
	if (r)
		return r;
	flags = le32toh(h->flags);
	x->version = le32toh(h->version);
	x->zero_gte = flags & FLAG_ZERO_GTE;
	x->compressed = flags & FLAG_COMPRESSED;
	x->unclean = h->unclean;
	x->first = x->compressed ? SECTOR : MAX(MIN(le64toh(h->overhead), sectors), 1) * SECTOR;
	x->gd = directory(x, le64toh(h->gd_off));
	x->rgd = flags & FLAG_REDUNDANT ? directory(x, le64toh(h->rgd_off)) : 0;
	if (!x->gd && !x->rgd)
		return error_set(err, EINVAL, "its grain directory of %llu entries would lie at sector %llu, outside the file",
			(unsigned long long)x->gts, (unsigned long long)le64toh(h->gd_off));
	if (!x->gd) {
		x->gd = x->rgd;
		x->rgd = 0;
	}
	return 0;
}

/* One file with its own descriptor. */
static int open_monolithic(struct image *i, struct vmdk *v, struct vmdk_desc *d, struct sparse_header *h,
	struct error *err)
{
	uint64_t at = le64toh(h->desc_off), n = le64toh(h->desc_size), sectors = i->file.size / SECTOR;
	auto_free char *text = NULL;
	struct vmdk_extent *x;
	int r;

	if (!at || !n)
		return error_set(err, EINVAL, "it is one part of a split image: its descriptor, a text file beside it, is to be opened");
	if (at > sectors || n > sectors - at || n > VMDK_TEXT_MAX / SECTOR)
		return error_set(err, EINVAL, "its descriptor would have %llu sectors at sector %llu: at most %u, inside the file",
			(unsigned long long)n, (unsigned long long)at, VMDK_TEXT_MAX / SECTOR);
	text = malloc(n * SECTOR);
	r = text ? meta_read(&i->file, text, n * SECTOR, at * SECTOR) : -ENOMEM;
	if (r)
		return error_errno(err, -r, "cannot read its descriptor");
	if (!*text)
		return error_set(err, EINVAL, "it is one part of a split image: its descriptor, a text file beside it, is to be opened");
	r = vmdk_desc_parse(d, text, n * SECTOR, err);
	if (r)
		return r;
	if (strcmp(d->create_type, "monolithicSparse") && strcmp(d->create_type, "streamOptimized"))
		return error_set(err, EOPNOTSUPP, "its createType is '%s': a file that begins with KDMV can be monolithicSparse or "
			"streamOptimized here", d->create_type);
	if (d->n != 1 || d->line->type != VMDK_SPARSE || d->line->no_access)
		return error_set(err, EINVAL, "its descriptor has %u extents: one of type SPARSE, the file itself, is read", d->n);
	x = v->x = calloc(1, sizeof(*x));
	if (!x)
		return error_set(err, ENOMEM, "out of memory");
	v->n = 1;
	x->line = *d->line;
	x->own.fd = x->own.meta_fd = -1;
	x->file = &i->file;
	r = open_sparse(x, h, err);
	x->end = r ? 0 : le64toh(h->capacity) * SECTOR;
	x->first = MAX(x->first, (at + n) * SECTOR);
	return r;
}

/* ---- opening: a descriptor and its extents ---- */

static const char *base_name(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

/* "disk-flat.vmdk" and "disk-s001.vmdk" belong to "disk.vmdk". */
static bool named_after(const char *name, const char *path)
{
	const char *base = base_name(path), *dot = strrchr(base, '.');
	size_t n = dot ? (size_t)(dot - base) : strlen(base);

	return n && !strncmp(name, base, n) && name[n] == '-';
}

static int open_beside(const char *name, const char *path, struct error *err)
{
	size_t n = (size_t)(base_name(path) - path);
	auto_free char *dir = n ? strndup(path, n) : strdup(".");
	int fd = dir ? confined_open(dir, name) : -ENOMEM;

	return fd >= 0 ? fd : error_errno(err, -fd, "cannot open its extent '%s' (a file beside it, no symbolic link)", name);
}

/* A file like the descriptor: what its owner could read anyway, and not the descriptor itself. */
static int check_file(const struct image *i, int fd, const char *name, struct error *err)
{
	struct stat st, own;

	if (fstat(fd, &st) || fstat(i->file.fd, &own))
		return error_errno(err, errno, "cannot look at its extent '%s'", name);
	if (!S_ISREG(st.st_mode))
		return error_set(err, EINVAL, "its extent '%s' is not a regular file", name);
	if (st.st_uid != own.st_uid)
		return error_set(err, EACCES, "its extent '%s' belongs to another user", name);
	if (st.st_dev == own.st_dev && st.st_ino == own.st_ino)
		return error_set(err, EINVAL, "its extent '%s' is the descriptor itself", name);
	return 0;
}

static int open_extent_file(const struct image *i, struct vmdk_extent *x, const struct image_how *how, struct error *err)
{
	const char *name = x->line.name;
	int fd, r;

	if (!named_after(name, i->path))
		return error_set(err, EACCES, "its extent '%s' is not named after it ('NAME-….vmdk' for NAME.vmdk): only such files are opened",
			name);
	fd = how->opener ? how->opener->open(how->opener, name, i->path, err) : open_beside(name, i->path, err);
	if (fd < 0)
		return fd;
	r = check_file(i, fd, name, err);
	if (r) {
		close(fd);
		return r;
	}
	x->file = &x->own;
	r = file_adopt(&x->own, fd, name, true, err);
	if (!r && !how->share)
		r = lock_image(fd, name, true, err);
	return r ? r : file_prepare(&x->own, err);
}

static int check_flat(const struct vmdk_extent *x, struct error *err)
{
	uint64_t sectors = x->file->size / SECTOR;

	if (x->line.offset <= sectors && x->line.sectors <= sectors - x->line.offset)
		return 0;
	return error_set(err, EINVAL, "it has %llu sectors: the descriptor says %llu from %llu on", (unsigned long long)sectors,
		(unsigned long long)x->line.sectors, (unsigned long long)x->line.offset);
}

static int check_part(struct vmdk_extent *x, struct error *err)
{
	struct sparse_header h;
	int r = read_header(x->file, 0, &h, err);

	if (!r)
		r = open_sparse(x, &h, err);
	if (r)
		return r;
	if (x->compressed)
		return error_set(err, EOPNOTSUPP, "a compressed extent in a split image: compressed ones can be read as one file");
	if (le64toh(h.capacity) < x->line.sectors)
		return error_set(err, EINVAL, "it has %llu sectors: the descriptor says %llu",
			(unsigned long long)le64toh(h.capacity), (unsigned long long)x->line.sectors);
	return 0;
}

static int open_extent(const struct image *i, struct vmdk_extent *x, const struct image_how *how, struct error *err)
{
	int r;

	if (x->line.type == VMDK_ZERO || x->line.no_access)
		return 0;
	r = open_extent_file(i, x, how, err);
	if (r)
		return r;
	r = x->line.type == VMDK_FLAT ? check_flat(x, err) : check_part(x, err);
	if (r)
		error_prefix(err, "its extent '%s': ", x->line.name);
	return r;
}

static int open_split(struct image *i, struct vmdk *v, struct vmdk_desc *d, const struct image_how *how,
	struct error *err)
{
	static const char *const known[] = { "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat" };
	auto_free char *text = NULL;
	uint64_t n = i->file.size, at = 0;
	unsigned k = 0;
	int r;

	if (n > VMDK_TEXT_MAX)
		return error_set(err, EINVAL, "its descriptor has %llu bytes: at most %u", (unsigned long long)n, VMDK_TEXT_MAX);
	text = malloc(n);
	r = text ? meta_read(&i->file, text, n, 0) : -ENOMEM;
	if (r)
		return error_errno(err, -r, "cannot read its descriptor");
	r = vmdk_desc_parse(d, text, n, err);
	if (r)
		return r;
	while (k < ARRAY_LEN(known) && strcmp(d->create_type, known[k]))
		k++;
	if (k == ARRAY_LEN(known))
		return error_set(err, EOPNOTSUPP, "its createType is '%s': monolithicFlat, twoGbMaxExtentSparse and twoGbMaxExtentFlat "
			"can be read, and as one file monolithicSparse and streamOptimized", d->create_type);
	v->x = calloc(d->n, sizeof(*v->x));
	if (!v->x)
		return error_set(err, ENOMEM, "out of memory");
	for (k = 0; k < d->n && !r; k++) {
		struct vmdk_extent *x = &v->x[v->n++];

		x->own.fd = x->own.meta_fd = -1;
		x->line = d->line[k];
		x->start = at;
		x->end = at += x->line.sectors * SECTOR;
		r = open_extent(i, x, how, err);
	}
	return r;
}

/* ---- opening ---- */

static bool vmdk_looks(const uint8_t *head, size_t n)
{
	return (n >= 4 && (!memcmp(head, "KDMV", 4) || !memcmp(head, "COWD", 4))) ||
		(n >= sizeof(VMDK_MAGIC) - 1 && !memcmp(head, VMDK_MAGIC, sizeof(VMDK_MAGIC) - 1));
}

static int make_caches(struct image *i, struct vmdk *v, struct error *err)
{
	i->cluster = 0;
	for (unsigned k = 0; k < v->n; k++) {
		struct vmdk_extent *x = &v->x[k];

		if (!x->grain)
			continue;
		x->pages = tables_new_file(i, x->file, PAGE, PAGES / v->n);
		x->markers = x->compressed ? tables_new_file(i, x->file, SECTOR, MARKERS) : NULL;
		if (!x->pages || (x->compressed && !x->markers))
			return error_set(err, ENOMEM, "out of memory");
		i->cluster = i->cluster ? MIN(i->cluster, x->grain) : x->grain;
	}
	i->cluster = i->cluster ? i->cluster : FLAT_CLUSTER;
	return 0;
}

static int vmdk_open(struct image *i, const struct image_how *how, struct error *err)
{
	struct vmdk *v = i->priv = calloc(1, sizeof(*v));
	struct vmdk_desc d = { 0 };
	struct sparse_header h;
	int r;

	if (!v)
		return error_set(err, ENOMEM, "out of memory");
	r = meta_read(&i->file, &h, sizeof(h), 0);
	if (r)
		return error_errno(err, -r, "cannot read its header");
	if (!memcmp(&h, VMDK_MAGIC, sizeof(VMDK_MAGIC) - 1)) {
		r = open_split(i, v, &d, how, err);
	} else {
		r = read_header(&i->file, 0, &h, err);
		r = r ? r : open_monolithic(i, v, &d, &h, err);
	}
	memcpy(v->create_type, d.create_type, sizeof(v->create_type));
	vmdk_desc_free(&d);
	r = r ? r : make_caches(i, v, err);
	i->size = r ? 0 : v->x[v->n - 1].end;
	return r;
}

static void vmdk_close(struct image *i)
{
	struct vmdk *v = i->priv;

	for (unsigned k = 0; v && k < v->n; k++) {
		tables_free(v->x[k].pages);
		tables_free(v->x[k].markers);
		file_close(&v->x[k].own);
	}
	free(v ? v->x : NULL);
	free(v);
}

static void vmdk_describe(const struct image *i, struct facts *f)
{
	const struct vmdk *v = i->priv;
	const struct vmdk_extent *x = v->x;

	facts_str(f, "create_type", v->create_type);
	facts_u64(f, "extents", v->n);
	if (!x->grain)
		return;
	facts_u64(f, "version", x->version);
	facts_u64(f, "grain_size", x->grain);
	facts_bool(f, "compressed", x->compressed);
	facts_bool(f, "closed_properly", !x->unclean);
}

const struct format_ops vmdk_format = {
	.name = "vmdk",
	.looks = vmdk_looks,
	.open = vmdk_open,
	.close = vmdk_close,
	.map = vmdk_map,
	.decompress = vmdk_decompress,
	.describe = vmdk_describe,
};
