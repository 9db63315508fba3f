/*
 * The VHD format (Microsoft Virtual PC, Hyper-V; QEMU's name for it is vpc), read-only: fixed and dynamic images.
 *
 *      fixed       guest bytes ...                                                       | footer
 *      dynamic     copy of the footer | dynamic header | BAT | bitmap, block | bitmap, block | ... | footer
 *
 * How this works. An entry of the BAT is the sector at which a block begins: first a bitmap of the block's sectors, which
 * ends on a sector, then the block. A sector whose bit is clear, and a block without an entry, was never written. BAT and
 * bitmaps are read in pages through the cache of tables.
 *
 * Source: "Virtual Hard Disk Image Format Specification", Microsoft, 1.0 of 11 October 2006. All numbers are big-endian.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "format.h"

#define FOOTER      512u
#define OLD_FOOTER  511u                /* of Virtual PC before 2004 */
#define DYNAMIC     1024u               /* the dynamic header */
#define VERSION     1u                  /* major */
#define NONE        0xffffffffu         /* entry: the block was never written */
#define BLOCK_LEAST 4096u               /* a byte of bitmap */
#define BLOCK_MOST  (256u << 20)
#define SIZE_MOST   (2ull << 40)        /* what 32 bits of sector numbers reach */
#define PAGE        4096u
#define PAGES       256u
#define CHS_MOST    (65535ull * 16 * 255)

enum { AT_VERSION = 12, AT_HEADER = 16, AT_CREATOR = 28, AT_SIZE = 48, AT_CYLINDERS = 56, AT_HEADS = 58, AT_SECTORS = 59,
	AT_TYPE = 60, AT_CHECKSUM = 64 };
enum { DYN_BAT = 16, DYN_VERSION = 24, DYN_ENTRIES = 28, DYN_BLOCK = 32, DYN_CHECKSUM = 36 };
enum { TYPE_FIXED = 2, TYPE_DYNAMIC, TYPE_DIFF };

struct vhd {
	bool fixed;
	char creator[5];
	uint32_t block, shift, bitmap;  /* bitmap: bytes before each block */
	uint64_t bat;
	struct tables *tables;
};

static uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, 4);
	return be32toh(v);
}

static uint64_t get64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, 8);
	return be64toh(v);
}

/* ---- footer and header ---- */

static uint32_t checksum(const uint8_t *p, size_t n, unsigned at)
{
	uint32_t sum = 0;

	for (size_t k = 0; k < n; k++)
		sum += k < at || k >= at + 4 ? p[k] : 0;
	return ~sum;
}

static bool is_footer(const uint8_t *p)
{
	return !memcmp(p, "conectix", 8);
}

static bool sums_up(const uint8_t *p)
{
	return is_footer(p) && checksum(p, FOOTER, AT_CHECKSUM) == get32(p + AT_CHECKSUM);
}

static bool vhd_looks(const uint8_t *head, size_t n)
{
	return n >= 8 && is_footer(head);       /* dynamic ones only: a fixed one begins with the guest's bytes */
}

/* The footer at the end, padded to 512 bytes; *at: where it begins. */
static int read_end(const struct host_file *f, uint8_t *footer, uint64_t *at)
{
	for (unsigned n = FOOTER; n >= OLD_FOOTER && n <= f->size; n--) {
		ssize_t got = file_peek(f, footer, n, f->size - n);

		if (got < 0)
			return (int)got;
		memset(footer + got, 0, FOOTER - (size_t)got);
		*at = f->size - n;
		if (is_footer(footer))
			return 0;
	}
	return 0;
}

static int read_footer(struct image *i, uint8_t *footer, uint64_t *at, struct error *err)
{
	const struct host_file *f = &i->file;
	uint8_t copy[FOOTER] = { 0 };
	ssize_t n = file_peek(f, copy, FOOTER, 0);
	int r = n < 0 ? (int)n : 0;

	if (f->size < OLD_FOOTER)
		return error_set(err, EINVAL, "it has %llu bytes: a VHD footer alone has 512", (unsigned long long)f->size);
	r = r ? r : read_end(f, footer, at);
	if (r)
		return error_errno(err, -r, "cannot read its footer");
	if (sums_up(footer))
		return 0;
	if (sums_up(copy) && get32(copy + AT_TYPE) != TYPE_FIXED) {
		log_warn("'%s': the footer at its end is missing or broken: the copy at its start is used", i->path);
		memcpy(footer, copy, FOOTER);
		*at = f->size;
		return 0;
	}
	if (!is_footer(footer))
		return error_set(err, EINVAL, "no VHD image: it does not end with a 'conectix' footer");
	return error_set(err, EINVAL, "the checksum of its footer is 0x%08x, but its bytes make 0x%08x", get32(footer + AT_CHECKSUM),
		checksum(footer, FOOTER, AT_CHECKSUM));
}

/*
 * Virtual PC, Virtual Server and QEMU's first way of making images show the disk that the geometry describes; all others
 * the size in the footer. A geometry that is as large as it can be says nothing.
 */
static uint64_t size_of(const uint8_t *footer)
{
	static const char by_geometry[][5] = { "vpc ", "vs  ", "qemu" };
	uint64_t chs = (uint64_t)(footer[AT_CYLINDERS] << 8 | footer[AT_CYLINDERS + 1]) * footer[AT_HEADS] * footer[AT_SECTORS];

	for (size_t k = 0; k < ARRAY_LEN(by_geometry); k++)
		if (!memcmp(footer + AT_CREATOR, by_geometry[k], 4) && chs != CHS_MOST)
			return chs * SECTOR;
	return get64(footer + AT_SIZE) / SECTOR * SECTOR;
}

static int check_footer(const uint8_t *footer, uint64_t size, struct error *err)
{
	uint32_t type = get32(footer + AT_TYPE), version = get32(footer + AT_VERSION);

	if (version >> 16 != VERSION)
		return error_set(err, EOPNOTSUPP, "VHD version %u.%u: only 1.0 is supported", version >> 16, version & 0xffff);
	if (type == TYPE_DIFF)
		return error_set(err, EOPNOTSUPP, "it is a differencing VHD image: only whole ones are supported (merge it first)");
	if (type != TYPE_FIXED && type != TYPE_DYNAMIC)
		return error_set(err, EINVAL, "disk type %u: 2 (fixed) and 3 (dynamic) are supported", type);
	if (!size || size > SIZE_MOST)
		return error_set(err, EINVAL, "a disk of %llu bytes: 512 to 2T are supported", (unsigned long long)size);
	return 0;
}

static int check_dynamic(const struct image *i, const uint8_t *h, uint64_t at, struct error *err)
{
	uint32_t block = get32(h + DYN_BLOCK), version = get32(h + DYN_VERSION);
	uint64_t bat = get64(h + DYN_BAT), entries = get32(h + DYN_ENTRIES);

	if (memcmp(h, "cxsparse", 8))
		return error_set(err, EINVAL, "there is no 'cxsparse' header at byte %llu", (unsigned long long)at);
	if (checksum(h, DYNAMIC, DYN_CHECKSUM) != get32(h + DYN_CHECKSUM))
		return error_set(err, EINVAL, "the checksum of its dynamic header is 0x%08x, but its bytes make 0x%08x",
			get32(h + DYN_CHECKSUM), checksum(h, DYNAMIC, DYN_CHECKSUM));
	if (version >> 16 != VERSION)
		return error_set(err, EOPNOTSUPP, "dynamic header version %u.%u: only 1.0 is supported", version >> 16,
			version & 0xffff);
	if (block < BLOCK_LEAST || block > BLOCK_MOST || block & (block - 1))
		return error_set(err, EINVAL, "blocks of %u bytes: a power of two from 4K to 256M is supported", block);
	if (entries * block < i->size)
		return error_set(err, EINVAL, "%llu blocks of %u bytes are too few for a disk of %llu bytes",
			(unsigned long long)entries, block, (unsigned long long)i->size);
	if (bat % SECTOR || bat < FOOTER || (bat < at + DYNAMIC && bat >= at))
		return error_set(err, EINVAL, "its block table begins at byte %llu: inside a header, or not on a sector",
			(unsigned long long)bat);
	if (bat > i->file.size || (i->size + block - 1) / block * 4 > i->file.size - bat)
		return error_set(err, EINVAL, "it is cut short: its block table of %llu entries begins at byte %llu, the file ends at %llu",
			(unsigned long long)entries, (unsigned long long)bat, (unsigned long long)i->file.size);
	return 0;
}

static int open_dynamic(struct image *i, const uint8_t *footer, struct error *err)
{
	struct vhd *v = i->priv;
	uint64_t at = get64(footer + AT_HEADER);
	uint8_t h[DYNAMIC];
	int r = at > INT64_MAX - DYNAMIC ? -EIO : meta_read_all(&i->file, h, DYNAMIC, at);

	if (r == -EIO)
		return error_set(err, EINVAL, "its dynamic header at byte %llu is not in the file, which ends at %llu",
			(unsigned long long)at, (unsigned long long)i->file.size);
	if (r)
		return error_errno(err, -r, "cannot read its dynamic header");
	r = check_dynamic(i, h, at, err);
	if (r)
		return r;
	v->bat = get64(h + DYN_BAT);
	v->block = i->cluster = get32(h + DYN_BLOCK);
	v->shift = (uint32_t)__builtin_ctz(v->block);
	v->bitmap = (v->block / SECTOR / 8 + SECTOR - 1) / SECTOR * SECTOR;
	v->tables = tables_new(i, PAGE, PAGES);
	return v->tables ? 0 : error_set(err, ENOMEM, "out of memory");
}

static int vhd_open(struct image *i, const struct image_how *how, struct error *err)
{
	struct vhd *v = calloc(1, sizeof(*v));
	uint8_t footer[FOOTER] = { 0 };
	uint64_t end = 0;
	int r;

	(void)how;
	i->priv = v;
	if (!v)
		return error_set(err, ENOMEM, "out of memory");
	r = read_footer(i, footer, &end, err);
	if (r)
		return r;
	i->size = size_of(footer);
	r = check_footer(footer, i->size, err);
	if (r)
		return r;
	memcpy(v->creator, footer + AT_CREATOR, 4);
	v->fixed = get32(footer + AT_TYPE) == TYPE_FIXED;
	if (!v->fixed)
		return open_dynamic(i, footer, err);
	if (i->size > end)
		return error_set(err, EINVAL, "it is cut short: a disk of %llu bytes, but the footer is at byte %llu",
			(unsigned long long)i->size, (unsigned long long)end);
	return 0;
}

static void vhd_close(struct image *i)
{
	struct vhd *v = i->priv;

	if (!v)
		return;
	tables_free(v->tables);
	free(v);
	i->priv = NULL;
}

/* ---- the map ---- */

/* The page with the byte at off: its bytes from there on, and how many. */
static int page_at(struct image *i, uint64_t off, const uint8_t **p, uint64_t *n)
{
	struct vhd *v = i->priv;
	struct table *t;
	int r = tables_get(v->tables, off & ~(uint64_t)(PAGE - 1), &t);

	if (r)
		return r;
	*p = (const uint8_t *)t->data + off % PAGE;
	*n = PAGE - off % PAGE;
	return 0;
}

static bool bit(const uint8_t *map, uint64_t k)
{
	return map[k / 8] << k % 8 & 0x80;
}

/* Sectors from the first on whose bit is the same, of the n in this piece of a bitmap. */
static uint64_t run_of(const uint8_t *map, uint64_t first, uint64_t n)
{
	uint8_t whole = bit(map, first) ? 0xff : 0;
	uint64_t k = first + 1;

	while (k < n) {
		if (k % 8 == 0 && n - k >= 8 && map[k / 8] == whole)
			k += 8;
		else if (bit(map, k) == (whole != 0))
			k++;
		else
			break;
	}
	return k - first;
}

/* off lies in a block that begins at host byte pos, bitmap first. */
static int map_block(struct image *i, uint64_t off, uint64_t pos, struct extent *e)
{
	struct vhd *v = i->priv;
	uint64_t in = off & (v->block - 1), sector = in / SECTOR, n, here = MIN(v->block, i->size - (off - in));
	const uint8_t *map;
	int r;

	if (pos + v->bitmap + here > i->file.size)
		return image_corrupt(i, "block %llu lies at byte %llu, past the end of the file",
			(unsigned long long)(off >> v->shift), (unsigned long long)pos);
	r = page_at(i, pos + sector / 8, &map, &n);
	if (r)
		return r;
	n = MIN(n * 8, v->block / SECTOR - sector / 8 * 8);
	*e = (struct extent){ .kind = bit(map, sector % 8) ? EXT_DATA : EXT_HOLE, .file = &i->file,
		.pos = pos + v->bitmap + in, .len = run_of(map, sector % 8, n) * SECTOR - in % SECTOR };
	return 0;
}

static int vhd_map(struct image *i, uint64_t off, uint64_t len, struct extent *e)
{
	struct vhd *v = i->priv;
	uint64_t block = off >> v->shift, n;
	const uint8_t *bat;
	uint32_t first;
	int r;

	if (v->fixed) {
		*e = (struct extent){ .kind = EXT_DATA, .len = len, .pos = off, .file = &i->file };
		return 0;
	}
	r = page_at(i, v->bat + block * 4, &bat, &n);
	if (r)
		return r;
	first = get32(bat);
	if (first != NONE) {
		r = map_block(i, off, (uint64_t)first * SECTOR, e);
		if (r)
			return r;
	} else {
		*e = (struct extent){ .kind = EXT_HOLE, .len = v->block - (off & (v->block - 1)) };
		for (uint64_t k = 4; k < n && e->len < len && get32(bat + k) == NONE; k += 4)
			e->len += v->block;
	}
	e->len = MIN(e->len, len);
	return 0;
}

static void vhd_describe(const struct image *i, struct facts *f)
{
	const struct vhd *v = i->priv;

	facts_str(f, "subformat", v->fixed ? "fixed" : "dynamic");
	facts_str(f, "creator", v->creator);
	if (!v->fixed)
		facts_u64(f, "block_size", v->block);
}

const struct format_ops vhd_format = {
	.name = "vhd",
	.looks = vhd_looks,
	.open = vhd_open,
	.close = vhd_close,
	.map = vhd_map,
	.describe = vhd_describe,
};
