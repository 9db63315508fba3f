/*
 * The VDI format (VirtualBox): a header, one map of all blocks, blocks in the order in which they were first written.
 *
 *      0       map_off                      data_off
 *      header  | entry 0 | entry 1 | ...  |  place 0 | place 1 | ... | place allocated - 1
 *
 * How this works. An entry names the place of a block, or says that it has none (NONE) or reads as zeroes (ZERO). The
 * header counts the places that are taken; the next one is at the end. VirtualBox and QEMU both rely on it that places
 * below the count are in use, each once, so nothing is ever taken out of the map again: a block that is discarded keeps
 * its place, and the host file gets a hole there. Until the plan with that hole ran it is a "wipe": it reads as
 * zeroes, and a write to it waits for the plan.
 *
 * Order of a plan, so that a crash leaks at worst:
 *
 *      count | barrier (data too) | entries, holes | barrier
 *
 * A place is never handed out twice, because the count that covers it is on the medium before an entry that names it.
 * One that an unclean end left behind the count is used again, after a look at the whole map that nothing names it.
 *
 * Source: VirtualBox's VDICore.h names the fields (version 1.1, all little-endian) and its VDI.cpp says what it refuses; what
 * QEMU 7.2 refuses was tried out.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "format.h"

#define HEADER      512u
#define MAGIC       0xbeda107fu
#define VERSION     0x00010001u
#define HEADER_LEAST 0x180u             /* from the header's size to the parent's UUID */
#define NONE        0xffffffffu         /* entries: no place; and this or more is none */
#define ZERO        0xfffffffeu
#define BLOCK_LEAST 4096u
#define BLOCK_MOST  (64u << 20)
#define BLOCK_USUAL (1u << 20)          /* the only one that QEMU opens */
#define DATA_ALIGN  (1u << 20)
#define CACHE_BYTES (1u << 20)
#define WIPES       1024u
#define WIPE_HASH   256u
#define SPARES      4096u
#define PIECE       16384u              /* entries that tools read at once */
#define BITS_MOST   (1ull << 28)        /* places a check keeps a bit of: 32 MiB */
#define WORDS_MOST  50                  /* findings put into words */
#define TWICE_MOST  (1u << 20)          /* duplicates after which a check does not go on: a hole in the file is full of them */
#define COPY_CHUNK  (64u << 10)

/* Offsets in the header. */
enum { AT_MAGIC = 64, AT_VERSION = 68, AT_HEADER_SIZE = 72, AT_TYPE = 76, AT_MAP = 340, AT_DATA = 344, AT_SECTOR = 360,
	AT_SIZE = 368, AT_BLOCK = 376, AT_EXTRA = 380, AT_BLOCKS = 384, AT_COUNT = 388, AT_UUID = 392, AT_LINK = 424 };
enum { TYPE_DYNAMIC = 1, TYPE_FIXED, TYPE_UNDO, TYPE_DIFF };

/* A block with a place that reads as zeroes, though the host file may not yet. */
struct wipe {
	uint32_t block, place;
	bool unmap, running;            /* give the space back; it is in the plan that runs */
	uint16_t next;                  /* in its hash list: index + 1 */
};

struct vdi {
	uint8_t header[HEADER];         /* as it is in the file, but for the count */
	uint32_t block, shift, blocks, map_off, data_off;
	uint32_t table_size;            /* 512 where the map or the data begin inside a page */
	bool fixed, holes;              /* holes: the host file can have some */
	struct tables *tables;
	uint8_t *checked;               /* a bit for each table: its entries were looked at */
	uint32_t base;                  /* places taken when the image was opened: older entries are below */
	uint32_t next;                  /* places taken now, also by allocs that are not linked */
	uint32_t count_disk, count_plan;        /* what the header counts; and the plan that runs makes it */
	bool count_unsure;              /* a plan failed: perhaps after it wrote the count */
	uint64_t blank_from;            /* host offset from which new space reads as zeroes */
	struct alloc *allocs;
	unsigned wipes, spares;
	struct wipe wipe[WIPES];
	uint16_t wipe_hash[WIPE_HASH];
	uint32_t spare[SPARES];         /* places below next that no entry names */
	uint32_t seen[2048];            /* for check_table() */
};

static uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, 4);
	return le32toh(v);
}

static uint64_t get64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, 8);
	return le64toh(v);
}

static void put32(uint8_t *p, uint32_t v)
{
	v = htole32(v);
	memcpy(p, &v, 4);
}

static void put64(uint8_t *p, uint64_t v)
{
	v = htole64(v);
	memcpy(p, &v, 8);
}

static uint64_t place_pos(const struct vdi *v, uint64_t place)
{
	return v->data_off + (place << v->shift);
}

static bool has_place(uint32_t entry)
{
	return entry < ZERO;
}

/* ---- the header ---- */

static bool vdi_looks(const uint8_t *head, size_t n)
{
	return n >= AT_VERSION && get32(head + AT_MAGIC) == MAGIC;
}

static int check_kind(const uint8_t *h, struct error *err)
{
	static const uint8_t none[32];
	uint32_t version = get32(h + AT_VERSION), type = get32(h + AT_TYPE), size = get32(h + AT_HEADER_SIZE);

	if (get32(h + AT_MAGIC) != MAGIC)
		return error_set(err, EINVAL, "no VDI image: its signature is 0x%08x, not 0x%08x", get32(h + AT_MAGIC), MAGIC);
	if (version != VERSION)
		return error_set(err, EOPNOTSUPP, "VDI version %u.%u: only 1.1 is supported", version >> 16, version & 0xffff);
	if (size < HEADER_LEAST)
		return error_set(err, EINVAL, "its header says that it has %u bytes: %u or more", size, HEADER_LEAST);
	if (type == TYPE_DIFF || (type <= TYPE_FIXED && memcmp(h + AT_LINK, none, sizeof(none))))
		return error_set(err, EOPNOTSUPP, "it is a differencing image (of a snapshot): only whole VDI images are "
			"supported ('VBoxManage clonemedium' makes one)");
	if (type == TYPE_UNDO)
		return error_set(err, EOPNOTSUPP, "it is an undo image: only dynamic and fixed VDI images are supported");
	if (type != TYPE_DYNAMIC && type != TYPE_FIXED)
		return error_set(err, EINVAL, "image type %u: 1 (dynamic) and 2 (fixed) are supported", type);
	return 0;
}

static bool good_block(uint32_t n)
{
	return n >= BLOCK_LEAST && n <= BLOCK_MOST && !(n & (n - 1));
}

static int check_geometry(const uint8_t *h, struct error *err)
{
	uint64_t size = get64(h + AT_SIZE), blocks = get32(h + AT_BLOCKS);
	uint32_t block = get32(h + AT_BLOCK), sector = get32(h + AT_SECTOR), extra = get32(h + AT_EXTRA);

	if (!good_block(block))
		return error_set(err, EINVAL, "blocks of %u bytes: a power of two from 4K to 64M is supported", block);
	if (extra)
		return error_set(err, EOPNOTSUPP, "%u extra bytes before each block: only images without are supported", extra);
	if (sector != SECTOR)
		return error_set(err, EOPNOTSUPP, "sectors of %u bytes: only 512 is supported", sector);
	if (!size || size > IMAGE_SIZE_MAX)
		return error_set(err, EINVAL, "a disk of %llu bytes: 512 to 64T are supported", (unsigned long long)size);
	if (blocks * block < size)
		return error_set(err, EINVAL, "%llu blocks of %u bytes are too few for a disk of %llu bytes",
			(unsigned long long)blocks, block, (unsigned long long)size);
	return 0;
}

static int check_layout(const struct host_file *f, const uint8_t *h, struct error *err)
{
	uint64_t map = get32(h + AT_MAP), data = get32(h + AT_DATA), end = map + get32(h + AT_BLOCKS) * 4ull;
	uint64_t header = AT_HEADER_SIZE + (uint64_t)get32(h + AT_HEADER_SIZE);

	if (map % SECTOR || data % SECTOR)
		return error_set(err, EINVAL, "its block map begins at byte %llu and its data at %llu: both must be multiples of 512",
			(unsigned long long)map, (unsigned long long)data);
	if (map < MAX(header, HEADER))
		return error_set(err, EINVAL, "its block map begins at byte %llu, inside the header, which ends at %llu",
			(unsigned long long)map, (unsigned long long)MAX(header, HEADER));
	if (map >= f->size)
		return error_set(err, EINVAL, "its block map begins at byte %llu, but the file ends at %llu",
			(unsigned long long)map, (unsigned long long)f->size);
	if (data < end)
		return error_set(err, EINVAL, "its data begins at byte %llu, inside the block map, which ends at %llu",
			(unsigned long long)data, (unsigned long long)end);
	if (end > f->size)
		return error_set(err, EINVAL, "it is cut short: the block map ends at byte %llu, the file at %llu",
			(unsigned long long)end, (unsigned long long)f->size);
	return 0;
}

/* What must hold before a change is made. */
static int check_count(const struct host_file *f, const uint8_t *h, struct error *err)
{
	uint64_t count = get32(h + AT_COUNT), blocks = get32(h + AT_BLOCKS);
	uint64_t end = get32(h + AT_DATA) + count * get32(h + AT_BLOCK);

	if (count > blocks)
		return error_set(err, EINVAL, "its header counts %llu blocks allocated of %llu: 'vmm disk check --repair all' first",
			(unsigned long long)count, (unsigned long long)blocks);
	if (end > f->size)
		return error_set(err, EINVAL, "it is cut short: its %llu allocated blocks end at byte %llu, the file at %llu "
			"(ro opens what is there)", (unsigned long long)count, (unsigned long long)end, (unsigned long long)f->size);
	return 0;
}

static int read_header(const struct host_file *f, uint8_t *h, bool change, struct error *err)
{
	ssize_t n = file_peek(f, h, HEADER, 0);
	int r;

	if (n < 0)
		return error_errno(err, (int)-n, "cannot read its header");
	if (n < (ssize_t)HEADER)
		return error_set(err, EINVAL, "it has %zd bytes: a VDI header alone has 512", n);
	r = check_kind(h, err);
	r = r ? r : check_geometry(h, err);
	r = r ? r : check_layout(f, h, err);
	if (!r && change && get32(h + AT_DATA) % f->align)
		/* A block of the host's would be map and data at once, written by two ways. */
		return error_set(err, EINVAL, "cache=none needs data that begins at a multiple of %u here, for O_DIRECT: it begins "
			"at %u (cache=writeback takes it)", f->align, get32(h + AT_DATA));
	return r || !change ? r : check_count(f, h, err);
}

/* ---- state in memory ---- */

static void forget(struct vdi *v)
{
	tables_free(v->tables);
	free(v->checked);
	v->tables = NULL;
	v->checked = NULL;
}

/* All from the header in memory: at open, and after a tool wrote another one. */
static int settle(struct image *i)
{
	struct vdi *v = i->priv;
	const uint8_t *h = v->header;

	forget(v);
	v->block = get32(h + AT_BLOCK);
	v->shift = (uint32_t)__builtin_ctz(v->block);
	v->blocks = get32(h + AT_BLOCKS);
	v->map_off = get32(h + AT_MAP);
	v->data_off = get32(h + AT_DATA);
	v->fixed = get32(h + AT_TYPE) == TYPE_FIXED;
	v->base = v->next = v->count_disk = v->count_plan = get32(h + AT_COUNT);
	v->blank_from = i->file.blockdev ? UINT64_MAX : i->file.size;
	v->spares = 0;
	v->table_size = (v->map_off | v->data_off) % 4096 ? SECTOR : 4096;
	v->tables = tables_new(i, v->table_size, CACHE_BYTES / v->table_size);
	v->checked = calloc(1, v->blocks * 4ull / v->table_size / 8 + 1);
	i->cluster = v->block;
	i->size = (get64(h + AT_SIZE) + SECTOR - 1) / SECTOR * SECTOR;
	return v->tables && v->checked ? 0 : -ENOMEM;
}

static int write_header(struct image *i)
{
	struct vdi *v = i->priv;
	int r = meta_sync(&i->file);

	r = r ? r : meta_write(&i->file, v->header, HEADER, 0);
	return r ? r : meta_sync(&i->file);
}

/*
 * The whole map in pieces, for tools. fn returns 1 where it changed entries: they are written, after all that was written
 * before is on the medium. Or -errno.
 */
typedef int walk_fn(void *arg, uint64_t first, uint32_t *e, uint32_t n);
static int walk(struct image *i, walk_fn *fn, void *arg)
{
	struct vdi *v = i->priv;
	auto_free uint32_t *e = malloc(PIECE * 4);
	int r = e ? 0 : -ENOMEM;

	for (uint64_t first = 0; first < v->blocks && !r; first += PIECE) {
		uint32_t n = (uint32_t)MIN(v->blocks - first, PIECE);
		uint64_t at = v->map_off + first * 4;

		r = meta_read_all(&i->file, e, n * 4, at);
		for (uint32_t k = 0; k < n; k++)
			e[k] = le32toh(e[k]);
		r = r ? r : fn(arg, first, e, n);
		if (r != 1)
			continue;
		for (uint32_t k = 0; k < n; k++)
			e[k] = htole32(e[k]);
		r = meta_sync(&i->file);
		r = r ? r : meta_write(&i->file, e, n * 4, at);
	}
	return r;
}

/* ---- opening ---- */

struct survey {
	struct image *image;
	uint8_t *bits;          /* places that an entry names */
};

static int survey_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct survey *s = arg;
	struct vdi *v = s->image->priv;

	for (uint32_t k = 0; k < n; k++) {
		if (!has_place(e[k]))
			continue;
		if (e[k] >= v->base) {
			image_corrupt(s->image, "block %llu lies in place %u, but the header counts only %u",
				(unsigned long long)first + k, e[k], v->base);
			return -EIO;
		}
		if (e[k] >= BITS_MOST)
			continue;
		if (s->bits[e[k] / 8] >> e[k] % 8 & 1) {
			image_corrupt(s->image, "block %llu lies in place %u, and so does another", (unsigned long long)first + k,
				e[k]);
			return -EIO;
		}
		s->bits[e[k] / 8] |= (uint8_t)(1u << e[k] % 8);
	}
	return 0;
}

/*
 * The last run did not end well: does an entry name a place that the header does not count? And which places that it
 * counts does none name? A map that is wrong makes the image corrupt, and ends this; it still opens.
 */
static int survey(struct image *i)
{
	struct vdi *v = i->priv;
	uint64_t n = MIN(v->base, BITS_MOST);
	auto_free uint8_t *bits = calloc(1, n / 8 + 1);
	struct survey s = { i, bits };
	int r = bits ? walk(i, survey_piece, &s) : -ENOMEM;

	if (r)
		return i->corrupt ? 0 : r;
	for (uint64_t p = 0; p < n && v->spares < SPARES; p++)
		if (!(bits[p / 8] >> p % 8 & 1))
			v->spare[v->spares++] = (uint32_t)p;
	return 0;
}

static bool ended_badly(const struct image *i)
{
	const struct vdi *v = i->priv;

	return i->file.size >= place_pos(v, v->base + 1ull) || (v->base >= v->blocks && !v->fixed);
}

static int vdi_open(struct image *i, const struct image_how *how, struct error *err)
{
	struct host_file *f = &i->file;
	struct vdi *v = calloc(1, sizeof(*v));
	int r;

	i->priv = v;
	if (!v)
		return error_set(err, ENOMEM, "out of memory");
	r = read_header(f, v->header, !how->readonly && !how->repair, err);
	if (r)
		return r;
	r = settle(i);
	if (r)
		return error_errno(err, -r, "its block map");
	if (how->readonly)
		return 0;
	v->holes = !f->blockdev && !meta_hole(f, (f->size + 4095) / 4096 * 4096, 4096);        /* there is nothing: it only answers */
	r = !how->repair && ended_badly(i) ? survey(i) : 0;
	return r ? error_errno(err, -r, "cannot look through its block map") : 0;
}

static void vdi_close(struct image *i)
{
	struct vdi *v = i->priv;

	if (!v)
		return;
	forget(v);
	free(v);
	i->priv = NULL;
}

/* ---- the map ---- */

/* Some entries of one table: n from that of a block on. */
struct spot {
	struct table *t;
	uint32_t *e;
	uint32_t n;
};

static bool seen_twice(struct vdi *v, uint32_t place)
{
	uint32_t at = place * 0x9e3779b1u >> 21;

	while (v->seen[at] != NONE && v->seen[at] != place)
		at = (at + 1) % ARRAY_LEN(v->seen);
	if (v->seen[at] == place)
		return true;
	v->seen[at] = place;
	return false;
}

/* The first time that a table is used: it is as the file had it. first: the block of its first entry. */
static void check_table(struct image *i, const struct table *t, uint64_t first)
{
	struct vdi *v = i->priv;
	const uint32_t *e = t->data;
	uint64_t n = MIN(v->blocks - first, v->table_size / 4);

	memset(v->seen, 0xff, sizeof(v->seen));
	for (uint64_t k = 0; k < n; k++) {
		uint32_t place = le32toh(e[k]);

		if (!has_place(place))
			continue;
		if (place >= v->base)
			image_corrupt(i, "block %llu lies in place %u, but the header counts only %u",
				(unsigned long long)(first + k), place, v->base);
		else if (seen_twice(v, place))
			image_corrupt(i, "block %llu lies in place %u, and so does another", (unsigned long long)(first + k),
				place);
	}
}

static int find(struct image *i, uint64_t block, struct spot *s)
{
	struct vdi *v = i->priv;
	uint64_t per = v->table_size / 4, table = block / per;
	uint8_t *byte = &v->checked[table / 8], bit = (uint8_t)(1u << table % 8);
	int r = tables_get(v->tables, v->map_off + table * v->table_size, &s->t);

	if (r)
		return r;
	if (!i->file.readonly && !(*byte & bit)) {
		*byte |= bit;
		check_table(i, s->t, table * per);
	}
	s->e = (uint32_t *)s->t->data + block % per;
	s->n = (uint32_t)MIN(per - block % per, v->blocks - block);
	return 0;
}

static uint32_t entry(const struct spot *s, uint32_t k)
{
	return le32toh(s->e[k]);
}

/* The place is counted, and its bytes are in the file. */
static bool good_place(const struct image *i, uint32_t place)
{
	const struct vdi *v = i->priv;

	return place < v->next && place_pos(v, place + 1ull) <= i->file.size;
}

static int bad_place(struct image *i, uint64_t block, uint32_t place)
{
	const struct vdi *v = i->priv;

	if (place >= v->next)
		return image_corrupt(i, "block %llu lies in place %u, but the header counts only %u", (unsigned long long)block,
			place, v->next);
	return image_corrupt(i, "block %llu lies in place %u, past the end of the file", (unsigned long long)block, place);
}

static struct wipe *find_wipe(struct vdi *v, uint64_t block)
{
	if (!v->wipes)
		return NULL;
	for (uint16_t k = v->wipe_hash[block % WIPE_HASH]; k; k = v->wipe[k - 1].next)
		if (v->wipe[k - 1].block == block)
			return &v->wipe[k - 1];
	return NULL;
}

static enum extent_kind kind_of(struct vdi *v, uint64_t block, uint32_t e)
{
	return e == NONE ? EXT_HOLE : e == ZERO || find_wipe(v, block) ? EXT_ZERO : EXT_DATA;
}

static int vdi_map(struct image *i, uint64_t off, uint64_t len, struct extent *e)
{
	struct vdi *v = i->priv;
	uint64_t block = off >> v->shift, in = off & (v->block - 1);
	struct spot s;
	uint32_t first;
	int r = find(i, block, &s);

	if (r)
		return r;
	first = entry(&s, 0);
	*e = (struct extent){ .kind = kind_of(v, block, first), .len = v->block - in };
	if (e->kind == EXT_DATA) {
		if (!good_place(i, first))
			return bad_place(i, block, first);
		e->pos = place_pos(v, first) + in;
		e->file = &i->file;
	}
	for (uint32_t k = 1; k < s.n && e->len < len; k++) {
		uint32_t place = entry(&s, k);

		if (kind_of(v, block + k, place) != e->kind ||
			(e->kind == EXT_DATA && (place != first + k || !good_place(i, place))))
			break;
		e->len += v->block;
	}
	e->len = MIN(e->len, len);
	return 0;
}

/* ---- writing ---- */

static bool in_alloc(const struct vdi *v, uint64_t block)
{
	for (const struct alloc *a = v->allocs; a; a = a->next)
		if (block >= a->index && block - a->index < a->count)
			return true;
	return false;
}

/* A plan must run first. 0: a tool, and it did. */
static int want_plan(struct image *i)
{
	if (i->blocking && !i->gathering)
		return image_write_metadata(i);
	i->want = WANT_PLAN;
	return -EAGAIN;
}

static int set_file_size(struct host_file *f, uint64_t size)
{
	if (f->blockdev)
		return size <= f->size ? 0 : -ENOSPC;
	if (ftruncate(f->meta_fd, (off_t)size))
		return -errno;
	f->size = size;
	return 0;
}

/* Places for up to *n blocks, one after the other. Not ahead like file_grow(): the file's end says what was not counted. */
static int take_places(struct image *i, uint32_t *n, uint32_t *place)
{
	struct vdi *v = i->priv;
	uint64_t end;
	int r = 0;

	if (v->spares) {
		*n = 1;
		*place = v->spare[--v->spares];
		return 0;
	}
	*n = MIN(*n, v->blocks > v->next ? v->blocks - v->next : 0);
	if (!*n) {
		log_guest(&i->limit, "'%s': blocks that nothing refers to take the room of others ('vmm disk check --repair leaks')",
			i->path);
		return -ENOSPC;
	}
	end = place_pos(v, (uint64_t)v->next + *n);
	if (end > i->file.size)
		r = set_file_size(&i->file, end);
	if (r)
		return r;
	*place = v->next;
	v->next += *n;
	return 0;
}

static int alloc_new(struct image *i, uint64_t off, uint64_t len, const struct spot *s, struct alloc *a)
{
	struct vdi *v = i->priv;
	uint64_t block = off >> v->shift, in = off & (v->block - 1), want = (in + len + v->block - 1) >> v->shift;
	uint32_t n = 0, place;
	int r;

	while (n < MIN(want, s->n) && !has_place(entry(s, n)) && !in_alloc(v, block + n))
		n++;
	if (!n)
		return -EBUSY;
	r = take_places(i, &n, &place);
	if (r)
		return r;
	a->off = off;
	a->len = MIN(len, ((uint64_t)n << v->shift) - in);
	a->first = place_pos(v, place);
	a->pos = a->first + in;
	a->fresh = true;
	a->blank = a->first >= v->blank_from;
	a->fill_off = block << v->shift;
	a->fill_end = (block + n) << v->shift;
	a->index = (uint32_t)block;
	a->count = n;
	a->table = s->t;
	table_pin(s->t);
	a->next = v->allocs;
	v->allocs = a;
	return 0;
}

static int vdi_alloc(struct image *i, uint64_t off, uint64_t len, struct alloc *a)
{
	struct vdi *v = i->priv;
	uint64_t block = off >> v->shift, in = off & (v->block - 1);
	struct spot s;
	uint32_t first;
	int r = i->corrupt ? -EIO : find_wipe(v, block) ? want_plan(i) : 0;

	r = r ? r : find(i, block, &s);
	if (r || i->corrupt)
		return r ? r : -EIO;
	first = entry(&s, 0);
	if (!has_place(first))
		return alloc_new(i, off, len, &s, a);
	if (!good_place(i, first))
		return bad_place(i, block, first);
	a->off = off;
	a->pos = place_pos(v, first) + in;
	a->fresh = false;
	a->len = v->block - in;
	for (uint32_t k = 1; k < s.n && a->len < len; k++) {
		if (entry(&s, k) != first + k || !good_place(i, first + k) || find_wipe(v, block + k))
			break;
		a->len += v->block;
	}
	a->len = MIN(a->len, len);
	return 0;
}

/* Out of the list. Returns its first place. */
static uint32_t end_alloc(struct vdi *v, struct alloc *a)
{
	struct alloc **at = &v->allocs;

	while (*at != a)
		at = &(*at)->next;
	*at = a->next;
	table_unpin(a->table);
	return (uint32_t)((a->first - v->data_off) >> v->shift);
}

static void vdi_link(struct image *i, struct alloc *a)
{
	struct vdi *v = i->priv;
	uint32_t place = end_alloc(v, a), *e = a->table->data;

	for (uint32_t k = 0; k < a->count; k++)
		e[a->index % (v->table_size / 4) + k] = htole32(place + k);
	table_dirty(a->table);
}

/* The last place that is taken, where nothing is in it: what stays spare at the end is a leak. */
static bool give_back_last(struct vdi *v)
{
	for (unsigned k = 0; k < v->spares; k++) {
		if (v->spare[k] != v->next - 1)
			continue;
		v->spare[k] = v->spare[--v->spares];
		v->next--;
		return true;
	}
	return false;
}

static void vdi_drop(struct image *i, struct alloc *a)
{
	struct vdi *v = i->priv;
	uint32_t place = end_alloc(v, a);

	v->blank_from = MAX(v->blank_from, place_pos(v, (uint64_t)place + a->count));
	for (uint32_t k = 0; k < a->count && v->spares < SPARES; k++)
		v->spare[v->spares++] = place + k;
	while (give_back_last(v))
		;
}

/* ---- zeroes ---- */

static void hash_wipe(struct vdi *v, unsigned k)
{
	uint16_t *head = &v->wipe_hash[v->wipe[k].block % WIPE_HASH];

	v->wipe[k].next = *head;
	*head = (uint16_t)(k + 1);
}

static int punch_block(struct image *i, uint64_t block, uint32_t place, enum punch_kind kind)
{
	struct vdi *v = i->priv;
	struct wipe *w;
	int r;

	if (in_alloc(v, block))
		return -EBUSY;
	if (!has_place(place) || (kind == PUNCH_DISCARD && !v->holes))
		return 0;
	if (!good_place(i, place))
		return bad_place(i, block, place);
	w = find_wipe(v, block);
	if (w) {
		w->unmap |= kind != PUNCH_ZERO && !w->running;
		return 0;
	}
	r = v->wipes == WIPES ? want_plan(i) : 0;
	if (r)
		return r;
	v->wipe[v->wipes] = (struct wipe){ (uint32_t)block, place, .unmap = kind != PUNCH_ZERO };
	hash_wipe(v, v->wipes++);
	return 0;
}

static int vdi_punch(struct image *i, uint64_t off, uint64_t len, enum punch_kind kind, uint64_t *done, uint64_t *part)
{
	struct vdi *v = i->priv;
	uint64_t block = off >> v->shift, in = off & (v->block - 1), n = len >> v->shift;
	struct spot s;
	uint32_t k = 0;
	int r = i->corrupt ? -EIO : find(i, block, &s);

	*done = 0;
	if (r || i->corrupt)
		return r ? r : -EIO;
	if (off + len == i->size)       /* its last block may go on behind it */
		n = (len + v->block - 1) >> v->shift;
	if (in || !n) {
		*part = MIN(len, v->block - in);
		if (kind_of(v, block, entry(&s, 0)) != EXT_DATA)
			*done = in_alloc(v, block) ? 0 : *part;
		return 0;
	}
	while (k < MIN(n, s.n) && !r) {
		r = punch_block(i, block + k, entry(&s, k), kind);
		k += !r;
	}
	*done = MIN(len, (uint64_t)k << v->shift);
	return k ? 0 : r;
}

/* ---- metadata ---- */

static int gather_wipes(struct image *i, struct plan *p)
{
	struct vdi *v = i->priv;
	int r = 0;

	for (unsigned k = 0; k < v->wipes && !r; k++) {
		struct wipe *w = &v->wipe[k];

		r = w->unmap && v->holes ? plan_punch(p, place_pos(v, w->place), v->block)
					 : plan_zero(p, place_pos(v, w->place), v->block);
		w->running = true;
	}
	return r;
}

static int vdi_gather(struct image *i, struct plan *p)
{
	struct vdi *v = i->priv;
	bool map = tables_any_dirty(v->tables);
	uint8_t count[4];
	int r = 0;

	put32(count, v->next);
	v->count_plan = v->next;
	if (v->next != v->count_disk || v->count_unsure)
		r = plan_write(p, AT_COUNT, count, sizeof(count));
	if (!r && map)
		r = plan_barrier(p);
	if (!r && map)
		r = tables_gather(v->tables, p);
	if (!r)
		r = gather_wipes(i, p);
	return r || !p->n ? r : plan_barrier(p);
}

static void vdi_gathered(struct image *i, int err)
{
	struct vdi *v = i->priv;
	unsigned n = v->wipes;

	tables_gathered(v->tables, err);
	v->count_unsure = err;
	if (!err) {
		v->count_disk = v->count_plan;
		put32(v->header + AT_COUNT, v->count_disk);
	}
	v->wipes = 0;
	memset(v->wipe_hash, 0, sizeof(v->wipe_hash));
	for (unsigned k = 0; k < n; k++) {
		if (v->wipe[k].running && !err)
			continue;
		v->wipe[v->wipes] = v->wipe[k];
		v->wipe[v->wipes].running = false;
		hash_wipe(v, v->wipes++);
	}
}

/* ---- making one ---- */

static int check_options(const struct image_create *c, struct error *err)
{
	if (c->backing)
		return error_set(err, EINVAL, "format vdi has no backing files: qcow2 has");
	if (c->version || c->refcount_bits || c->extended_l2 || c->zstd || c->lazy_refcounts)
		return error_set(err, EINVAL, "format vdi has no options but the block size, fixed and its preallocation");
	if (c->prealloc != PREALLOC_OFF && !c->fixed)
		return error_set(err, EINVAL, "a dynamic vdi has no preallocation: a fixed one has all its blocks");
	if (c->cluster && !good_block(c->cluster))
		return error_set(err, EINVAL, "blocks of %u bytes: a power of two from 4K to 64M (QEMU opens only 1M)", c->cluster);
	if (!c->size)
		return error_set(err, EINVAL, "a vdi disk of 0 bytes: 512 or more");
	return 0;
}

static int make_header(uint8_t *h, const struct image_create *c, struct error *err)
{
	uint32_t block = c->cluster ? c->cluster : BLOCK_USUAL;
	uint64_t blocks = (c->size + block - 1) / block;
	uint64_t data = (4096 + blocks * 4 + DATA_ALIGN - 1) / DATA_ALIGN * DATA_ALIGN;

	if (data > UINT32_MAX)
		return error_set(err, EINVAL, "blocks of %u bytes are too small for a disk of %llu bytes", block,
			(unsigned long long)c->size);
	memset(h, 0, HEADER);
	strcpy((char *)h, "<<< vmm VirtualBox Disk Image >>>\n");
	put32(h + AT_MAGIC, MAGIC);
	put32(h + AT_VERSION, VERSION);
	put32(h + AT_HEADER_SIZE, HEADER_LEAST);
	put32(h + AT_TYPE, c->fixed ? TYPE_FIXED : TYPE_DYNAMIC);
	put32(h + AT_MAP, 4096);
	put32(h + AT_DATA, (uint32_t)data);
	put32(h + AT_SECTOR, SECTOR);
	put64(h + AT_SIZE, c->size);
	put32(h + AT_BLOCK, block);
	put32(h + AT_BLOCKS, (uint32_t)blocks);
	put32(h + AT_COUNT, c->fixed ? (uint32_t)blocks : 0);
	/* The image's own UUID and that of its last change; VirtualBox refuses zeroes. */
	if (getrandom(h + AT_UUID, 32, 0) != 32)
		return error_errno(err, errno, "no random numbers for its UUID");
	for (unsigned at = AT_UUID; at < AT_LINK; at += 16) {
		h[at + 7] = (h[at + 7] & 0x0f) | 0x40;
		h[at + 8] = (h[at + 8] & 0x3f) | 0x80;
	}
	return 0;
}

/* Entries [from, to) of the map at map_off: NONE, or places that count up from place. */
static int write_entries(const struct host_file *f, uint32_t map_off, uint64_t from, uint64_t to, bool places, uint32_t place)
{
	auto_free uint32_t *e = malloc(PIECE * 4);
	int r = e ? 0 : -ENOMEM;

	while (from < to && !r) {
		uint32_t n = (uint32_t)MIN(to - from, PIECE);

		for (uint32_t k = 0; k < n; k++)
			e[k] = htole32(places ? place++ : NONE);
		r = meta_write(f, e, n * 4, map_off + from * 4);
		from += n;
	}
	return r;
}

/* Bytes from the file's end to end, for blocks that are there from the start. */
static int provide(struct host_file *f, uint64_t end, enum image_prealloc prealloc)
{
	uint64_t old = f->size;
	int r = end > old || f->blockdev ? set_file_size(f, end) : 0;

	if (r || f->blockdev || end <= old)
		return r;
	if (prealloc == PREALLOC_FALLOC && fallocate(f->meta_fd, 0, (off_t)old, (off_t)(end - old)))
		return -errno;
	return prealloc == PREALLOC_FULL ? meta_fill(f, old, end - old) : 0;
}

static int vdi_create(struct host_file *f, const struct image_create *c, struct error *err)
{
	uint8_t h[HEADER];
	int r = check_options(c, err);
	uint32_t data, blocks;

	r = r ? r : make_header(h, c, err);
	if (r)
		return r;
	data = get32(h + AT_DATA);
	blocks = get32(h + AT_BLOCKS);
	f->size = f->blockdev ? f->size : 0;
	r = provide(f, data + (c->fixed ? (uint64_t)blocks * get32(h + AT_BLOCK) : 0), c->prealloc);
	if (!r && f->blockdev)
		r = meta_zero(f, 0, data + (c->fixed ? (uint64_t)blocks * get32(h + AT_BLOCK) : 0));
	r = r ? r : write_entries(f, 4096, 0, blocks, c->fixed, 0);
	r = r ? r : meta_sync(f);
	r = r ? r : meta_write(f, h, HEADER, 0);
	r = r ? r : meta_sync(f);
	return r ? error_errno(err, -r, "cannot write it") : 0;
}

/* ---- changing the size ---- */

static int copy_block(struct image *i, uint64_t from, uint64_t to)
{
	struct vdi *v = i->priv;
	auto_free uint8_t *buf = malloc(COPY_CHUNK);
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t at = 0; at < v->block && !r; at += COPY_CHUNK) {
		size_t n = MIN(v->block - at, COPY_CHUNK);

		r = meta_read(&i->file, buf, n, place_pos(v, from) + at);
		r = r ? r : meta_write(&i->file, buf, n, place_pos(v, to) + at);
	}
	return r;
}

struct move {
	struct image *image;
	uint32_t k;                     /* places at the start that the new map takes */
	uint32_t dest;                  /* where the first of them goes */
	uint32_t count;                 /* places taken before */
};

/* Blocks in the first k places go to the end, where the map refers to them then. */
static int move_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct move *m = arg;
	int changed = 0, r;

	for (uint32_t k = 0; k < n; k++) {
		if (!has_place(e[k]))
			continue;
		if (e[k] >= m->count)
			return image_corrupt(m->image, "block %llu lies in place %u, but the header counted only %u",
				(unsigned long long)first + k, e[k], m->count);
		if (e[k] >= m->k)
			continue;
		r = copy_block(m->image, e[k], (uint64_t)m->dest + e[k]);
		if (r)
			return r;
		e[k] += m->dest;
		changed = 1;
	}
	return changed;
}

/* The map as it will be, k places further: into the first places, which nothing refers to any more. */
static int shift_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct move *m = arg;
	struct vdi *v = m->image->priv;

	for (uint32_t k = 0; k < n; k++)
		e[k] = htole32(has_place(e[k]) ? e[k] - m->k : e[k]);
	return meta_write(&m->image->file, e, n * 4, v->data_off + first * 4);
}

static void set_count(struct vdi *v, uint32_t count)
{
	v->next = v->count_disk = v->count_plan = count;
	put32(v->header + AT_COUNT, count);
}

/*
 * The map does not fit before the data any more: it moves into the first places, their blocks to the end. Each
 * step leaves a whole image; the header, one sector, switches from the old map to the new one.
 */
static int make_room(struct image *i, uint64_t blocks, struct error *err)
{
	struct vdi *v = i->priv;
	uint64_t k = (blocks * 4 + v->block - 1) >> v->shift, dest = MAX(v->next, k), moved = MIN(v->next, k);
	uint64_t data = v->data_off + (k << v->shift);
	struct move m = { i, (uint32_t)k, (uint32_t)dest, v->next };
	int r;

	if (data > UINT32_MAX || dest + moved >= ZERO)
		return error_set(err, EFBIG, "blocks of %u bytes are too small for so large a disk", v->block);
	r = set_file_size(&i->file, place_pos(v, dest + moved));
	set_count(v, (uint32_t)(dest + moved));
	r = r ? r : write_header(i);
	r = r ? r : walk(i, move_piece, &m);
	r = r ? r : meta_sync(&i->file);
	r = r ? r : walk(i, shift_piece, &m);
	if (r) {
		i->corrupt = true;      /* what is cached of the map may be old */
		return error_errno(err, -r, "cannot move its block map");
	}
	put32(v->header + AT_MAP, v->data_off);
	put32(v->header + AT_DATA, (uint32_t)data);
	set_count(v, (uint32_t)(dest + moved - k));
	r = write_header(i);
	r = r ? r : settle(i);
	return r ? error_errno(err, -r, "cannot move its block map") : 0;
}

/* What the last block has behind the end of the disk becomes part of it: zeroes. */
static int clear_tail(struct image *i)
{
	struct vdi *v = i->priv;
	uint64_t in = i->size & (v->block - 1), block = i->size >> v->shift;
	struct spot s;
	int r = in ? find(i, block, &s) : 0;

	if (r || !in || !has_place(entry(&s, 0)))
		return r;
	if (!good_place(i, entry(&s, 0)))
		return bad_place(i, block, entry(&s, 0));
	return meta_zero(&i->file, place_pos(v, entry(&s, 0)) + in, v->block - in);
}

static int grow(struct image *i, uint64_t blocks, enum image_prealloc prealloc, struct error *err)
{
	struct vdi *v = i->priv;
	uint64_t more = blocks - v->blocks;
	int r = 0;

	if (v->map_off + blocks * 4 > v->data_off)
		r = make_room(i, blocks, err);
	if (r)
		return r;
	if (v->fixed && v->next + more >= ZERO)
		return error_set(err, EFBIG, "blocks of %u bytes are too small for so large a disk", v->block);
	r = clear_tail(i);
	if (!r && v->fixed)
		r = provide(&i->file, place_pos(v, v->next + more), prealloc);
	r = r ? r : write_entries(&i->file, v->map_off, v->blocks, blocks, v->fixed, v->next);
	if (r)
		return error_errno(err, -r, "cannot make it larger");
	if (v->fixed)
		set_count(v, (uint32_t)(v->next + more));
	return 0;
}

struct cut {
	uint64_t from, block;
};

static int cut_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct cut *c = arg;

	for (uint32_t k = 0; k < n; k++) {
		if (first + k < c->from || !has_place(e[k]))
			continue;
		c->block = first + k;
		return -EEXIST;
	}
	return 0;
}

static int check_cut(struct image *i, uint64_t blocks, struct error *err)
{
	struct vdi *v = i->priv;
	struct cut c = { .from = blocks };
	int r;

	if (v->fixed)
		return error_set(err, EOPNOTSUPP, "a fixed vdi has all its blocks and cannot be made smaller: convert it");
	r = walk(i, cut_piece, &c);
	if (r == -EEXIST)
		return error_set(err, EEXIST, "the block at %llu is allocated and would be cut off: convert it to a smaller image",
			(unsigned long long)c.block << v->shift);
	return r ? error_errno(err, -r, "cannot read its block map") : 0;
}

static int vdi_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err)
{
	struct vdi *v = i->priv;
	uint64_t blocks = (size + v->block - 1) >> v->shift;
	int r;

	if (!size)
		return error_set(err, EINVAL, "a vdi disk of 0 bytes: 512 or more");
	if (prealloc != PREALLOC_OFF && !v->fixed)
		return error_set(err, EINVAL, "a dynamic vdi has no preallocation: a fixed one has all its blocks");
	r = image_flush(i);
	if (r)
		return error_errno(err, -r, "cannot write it out");
	if (blocks < v->blocks)
		r = check_cut(i, blocks, err);
	else
		r = grow(i, MAX(blocks, v->blocks), prealloc, err);
	if (r)
		return r;
	put64(v->header + AT_SIZE, size);
	put32(v->header + AT_BLOCKS, (uint32_t)blocks);
	r = write_header(i);
	r = r ? r : settle(i);
	return r ? error_errno(err, -r, "cannot write its header") : 0;
}

/* ---- checking ---- */

struct audit {
	struct image *image;
	struct image_check *c;
	enum image_repair repair;
	uint8_t *bits;                  /* places that an entry names */
	uint64_t bits_n;
	uint64_t places;                /* that begin in the file */
	uint64_t used, high;            /* places named by entries; 1 + the last one */
	uint64_t twice, late, lost;     /* entries: a place named before; not counted; past the end of the file */
	uint64_t before;                /* the place of the block before */
	uint64_t slot;                  /* compact: the next place to look at */
	unsigned words;
};

__attribute__((format(printf, 2, 3)))
static void say(struct audit *a, const char *fmt, ...)
{
	char text[200];
	va_list ap;

	if (!a->c->complain || a->words++ > WORDS_MOST)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	a->c->complain(a->c, a->words > WORDS_MOST ? "more of the same is not shown" : text);
}

static bool bit(const struct audit *a, uint64_t place)
{
	return a->bits[place / 8] >> place % 8 & 1;
}

static void audit_place(struct audit *a, uint64_t block, uint32_t place)
{
	struct vdi *v = a->image->priv;

	a->c->allocated++;
	a->c->fragmented += place != a->before + 1 && a->before != UINT64_MAX;
	a->before = place;
	if (place >= v->count_disk) {
		a->late++;
		say(a, "block %llu lies in place %u, but the header counts only %u", (unsigned long long)block, place,
			v->count_disk);
	}
	a->high = MAX(a->high, place + 1ull);
	if (place >= a->bits_n) {
		a->c->errors++;
		return;
	}
	if (bit(a, place)) {
		a->twice++;
		say(a, "block %llu lies in place %u, and so does another: which of them is right cannot be known",
			(unsigned long long)block, place);
		return;
	}
	a->bits[place / 8] |= (uint8_t)(1u << place % 8);
	a->used++;
}

static int audit_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct audit *a = arg;
	int changed = 0;

	for (uint32_t k = 0; k < n; k++) {
		if (has_place(e[k]) && e[k] < a->places) {
			audit_place(a, first + k, e[k]);
		} else if (has_place(e[k])) {
			a->lost++;
			say(a, "block %llu lies in place %u, past the end of the file", (unsigned long long)first + k, e[k]);
			if (a->repair == REPAIR_ALL) {
				e[k] = ZERO;
				changed = 1;
			}
		}
	}
	return a->twice > TWICE_MOST ? -E2BIG : changed;
}

/* Blocks from behind the first `used` places into the gaps among them. */
static int compact_piece(void *arg, uint64_t first, uint32_t *e, uint32_t n)
{
	struct audit *a = arg;
	int changed = 0, r;

	(void)first;
	for (uint32_t k = 0; k < n; k++) {
		if (!has_place(e[k]) || e[k] < a->used)
			continue;
		while (a->slot < a->used && bit(a, a->slot))
			a->slot++;
		if (a->slot >= a->used)         /* the map is not what it was a moment ago */
			return -EIO;
		r = copy_block(a->image, e[k], a->slot);
		if (r)
			return r;
		e[k] = (uint32_t)a->slot++;
		changed = 1;
	}
	return changed;
}

static uint64_t leaked(const struct audit *a, uint64_t count)
{
	const struct vdi *v = a->image->priv;
	uint64_t end = place_pos(v, MAX(count, a->high)), over = a->image->file.size > end ? a->image->file.size - end : 0;

	if (a->image->file.blockdev)
		over = 0;
	return MAX(count, a->high) - a->used - a->c->errors + (over + v->block - 1) / v->block;
}

static int write_count(struct image *i, uint64_t count)
{
	set_count(i->priv, (uint32_t)count);
	return write_header(i);
}

static int mend_leaks(struct audit *a)
{
	struct image *i = a->image;
	struct vdi *v = i->priv;
	int r = a->used < a->high ? walk(i, compact_piece, a) : 0;

	r = r ? r : write_count(i, a->used);
	return r || i->file.blockdev ? r : set_file_size(&i->file, place_pos(v, a->used));
}

static int mend(struct audit *a, bool cut)
{
	struct image *i = a->image;
	struct vdi *v = i->priv;
	struct image_check *c = a->c;
	int r = 0;

	if (a->repair == REPAIR_ALL && cut)
		r = set_file_size(&i->file, place_pos(v, a->places));
	if (a->repair == REPAIR_ALL && !r && v->count_disk < a->high)
		r = write_count(i, a->high);
	if (a->repair == REPAIR_ALL && !r)
		c->fixed_corruptions = a->late + a->lost + cut;
	if (a->repair == REPAIR_NONE || r || c->fixed_corruptions < c->corruptions || c->errors || !c->leaks)
		return r;
	r = mend_leaks(a);
	if (!r)
		c->fixed_leaks = c->leaks;
	return r;
}

static int audit(struct audit *a)
{
	struct image *i = a->image;
	struct vdi *v = i->priv;
	struct image_check *c = a->c;
	uint64_t room = i->file.size > v->data_off ? i->file.size - v->data_off : 0;
	bool cut = false;
	int r;

	a->places = MIN((room + v->block - 1) >> v->shift, ZERO);
	a->bits_n = MIN(a->places, BITS_MOST);
	a->bits = calloc(1, a->bits_n / 8 + 1);
	r = a->bits ? walk(i, audit_piece, a) : -ENOMEM;
	if (r == -E2BIG) {
		c->corruptions = a->twice + a->late + a->lost;
		c->errors++;
		a->words = 0;
		say(a, "more than %u duplicates: the rest of the block map was not looked at", TWICE_MOST);
		return 0;
	}
	if (r)
		return r;
	c->clusters = v->blocks;
	c->end = place_pos(v, a->high);
	if (a->high == a->places && place_pos(v, a->places) > i->file.size) {
		cut = true;
		say(a, "the file ends at %llu, inside its last block", (unsigned long long)i->file.size);
	}
	c->corruptions = a->twice + a->late + a->lost + cut;
	if (c->errors)
		say(a, "%llu blocks lie in places above %llu, where duplicates are not looked for", (unsigned long long)c->errors,
			(unsigned long long)BITS_MOST);
	c->leaks = leaked(a, MIN(v->count_disk, a->places));
	if (v->count_disk > a->places)
		c->leaks += v->count_disk - a->places;
	if (c->leaks)
		say(a, "%llu places are not used by any block; the header counts %u, %llu are in use", (unsigned long long)c->leaks,
			v->count_disk, (unsigned long long)a->used);
	return mend(a, cut);
}

static int vdi_check(struct image *i, enum image_repair repair, struct image_check *c, struct error *err)
{
	struct audit a = { .image = i, .c = c, .repair = repair, .before = UINT64_MAX };
	int r = i->file.readonly || i->corrupt ? 0 : image_flush(i);

	r = r ? r : audit(&a);
	free(a.bits);
	if (r && repair != REPAIR_NONE)
		i->corrupt = true;      /* what is cached of the map may be old */
	if (r)
		return error_errno(err, -r, "cannot check it");
	if (repair == REPAIR_NONE)
		return 0;
	i->corrupt = c->fixed_corruptions < c->corruptions;
	r = settle(i);
	return r ? error_errno(err, -r, "cannot check it") : 0;
}

static void vdi_describe(const struct image *i, struct facts *f)
{
	const struct vdi *v = i->priv;

	facts_str(f, "subformat", v->fixed ? "fixed" : "dynamic");
	facts_u64(f, "block_size", v->block);
	facts_u64(f, "blocks", v->blocks);
	facts_u64(f, "blocks_allocated", v->next);
}

const struct format_ops vdi_format = {
	.name = "vdi",
	.looks = vdi_looks,
	.open = vdi_open,
	.close = vdi_close,
	.map = vdi_map,
	.alloc = vdi_alloc,
	.link = vdi_link,
	.drop = vdi_drop,
	.punch = vdi_punch,
	.gather = vdi_gather,
	.gathered = vdi_gathered,
	.create = vdi_create,
	.resize = vdi_resize,
	.check = vdi_check,
	.describe = vdi_describe,
};
