/*
 * VHDX (Microsoft, [MS-VHDX]), read only: fixed and dynamic images that were closed properly.
 *
 * How this works. The first megabyte says where the rest is, everything twice, each copy with a CRC-32C:
 *
 *      0       64K       128K      192K           256K           1M
 *      | "vhdxfile" | header 1 | header 2 | region table 1 | region table 2 |   | log, metadata, BAT, blocks: at megabytes
 *
 * The header with the higher sequence number holds. A log id that is not zero means that metadata is still in the log; only a writer
 * may put it where it belongs, so such an image is refused. The metadata region tells block size and disk size. The block
 * allocation table (BAT) has a u64 for each block of the disk: its state and its place in the file. After each
 * chunk of blocks stands one more entry, for a sector bitmap, of which only differencing images make use:
 *
 *      block 0, block 1, … block ratio-1, bitmap, block ratio, …       ratio = 2^23 * logical sector size / block size
 *
 * The BAT is cached as the 4 KiB pages of the file it lies in.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "format.h"

#define KIB 1024ull
#define MIB (1024 * KIB)

#define PAGE          4096u
#define PAGES         1024u             /* of the BAT in memory */
#define HEADER_LEN    4096u
#define TABLE_LEN     (64u << 10)       /* a region table; the metadata table */
#define ENTRIES_MAX   2047u             /* of either */
#define BLOCK_MIN     (1u << 20)
#define BLOCK_MAX     (256u << 20)

static const uint64_t header_at[2] = { 64 * KIB, 128 * KIB }, regions_at[2] = { 192 * KIB, 256 * KIB };

/* All little-endian. */
struct guid {
	uint8_t b[16];
};

struct header {
	uint8_t magic[4];
	uint32_t checksum;
	uint64_t sequence;
	struct guid file_write, data_write, log;
	uint16_t log_version, version;
	uint32_t log_len;
	uint64_t log_off;
} __attribute__((packed));

struct region_table {
	uint8_t magic[4];
	uint32_t checksum, count, reserved;
	struct region_entry {
		struct guid id;
		uint64_t off;
		uint32_t len, required;
	} __attribute__((packed)) entry[ENTRIES_MAX];
} __attribute__((packed));

struct metadata_table {
	uint8_t magic[8];
	uint16_t reserved, count;
	uint32_t reserved2[5];
	struct metadata_entry {
		struct guid id;
		uint32_t off, len;      /* off: in the region */
		uint32_t flags, reserved;
	} __attribute__((packed)) entry[ENTRIES_MAX];
} __attribute__((packed));

#define REGION_REQUIRED   1u
#define METADATA_REQUIRED 4u
#define FILE_HAS_PARENT   2u

_Static_assert(sizeof(struct header) == 80, "as on disk");
_Static_assert(sizeof(struct region_table) <= TABLE_LEN && sizeof(struct metadata_table) <= TABLE_LEN, "fits");

/* A GUID as it is written: the first three numbers are stored little-endian. */
#define GUID(a, b, c, d0, d1, d2, d3, d4, d5, d6, d7)                                              \
	{ { (a) & 0xff, (a) >> 8 & 0xff, (a) >> 16 & 0xff, (a) >> 24 & 0xff, (b) & 0xff, (b) >> 8, \
		(c) & 0xff, (c) >> 8, d0, d1, d2, d3, d4, d5, d6, d7 } }

static const struct guid bat_id = GUID(0x2dc27766u, 0xf623, 0x4200, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08);
static const struct guid metadata_id = GUID(0x8b7ca206u, 0x4790, 0x4b9a, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e);

enum item { FILE_PARAMETERS, DISK_SIZE, LOGICAL_SECTOR, PHYSICAL_SECTOR, PAGE83, PARENT_LOCATOR, NR_ITEMS };
static const struct {
	struct guid id;
	unsigned len;
	bool needed;
	const char *name;
} items[] = {
	[FILE_PARAMETERS] = { GUID(0xcaa16737u, 0xfa36, 0x4d43, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b), 8, true,
		"file parameters" },
	[DISK_SIZE] = { GUID(0x2fa54224u, 0xcd1b, 0x4876, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8), 8, true,
		"virtual disk size" },
	[LOGICAL_SECTOR] = { GUID(0x8141bf1du, 0xa96f, 0x4709, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f), 4, true,
		"logical sector size" },
	[PHYSICAL_SECTOR] = { GUID(0xcda348c7u, 0x445d, 0x4471, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56), 4, true,
		"physical sector size" },
	[PAGE83] = { GUID(0xbeca12abu, 0xb2e6, 0x4523, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46), 16, false,
		"disk id" },
	[PARENT_LOCATOR] = { GUID(0xa8d35f2du, 0xb30b, 0x454d, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c), 0, false,
		"parent locator" },
};

enum block_state { NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT = 6, PARTIALLY_PRESENT };

struct range {
	uint64_t off, len;
};

struct vhdx {
	struct range log, bat, metadata;
	uint32_t block, logical, physical;
	uint64_t ratio;                 /* blocks of a chunk */
	struct tables *pages;
};

/* ---- CRC-32C (Castagnoli, reflected), four bits at a time ---- */

static uint32_t crc32c(uint32_t crc, const void *data, size_t n)
{
	static const uint32_t by_nibble[16] = { 0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3,
		0x61c69362, 0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab,
		0xe330a81a, 0xf36e6f75 };
	const uint8_t *p = data;

	crc = ~crc;
	while (n--) {
		crc ^= *p++;
		crc = crc >> 4 ^ by_nibble[crc & 15];
		crc = crc >> 4 ^ by_nibble[crc & 15];
	}
	return ~crc;
}

/* The checksum is the u32 at offset 4 and counts as zero itself. */
static bool checksum_holds(uint8_t *buf, size_t n)
{
	uint32_t stored, zero = 0;
	bool ok;

	memcpy(&stored, buf + 4, sizeof(stored));
	memcpy(buf + 4, &zero, sizeof(zero));
	ok = crc32c(0, buf, n) == le32toh(stored);
	memcpy(buf + 4, &stored, sizeof(stored));
	return ok;
}

/* ---- the map ---- */

static bool overlap(const struct range *r, uint64_t off, uint64_t len)
{
	return off < r->off + r->len && r->off < off + len;
}

/* Does the part of block nr that is inside the disk lie in the file at pos, and is it nothing else? */
static bool block_fits(const struct image *i, uint64_t nr, uint64_t pos)
{
	const struct vhdx *v = i->priv;
	uint64_t len = MIN(v->block, i->size - nr * v->block);

	return pos >= MIB && pos <= i->file.size && len <= i->file.size - pos && !overlap(&v->log, pos, v->block) &&
		!overlap(&v->bat, pos, v->block) && !overlap(&v->metadata, pos, v->block);
}

static enum block_state state_of(uint64_t entry)
{
	return le64toh(entry) & 7;
}

static uint64_t place_of(uint64_t entry)
{
	return le64toh(entry) & ~(MIB - 1);
}

/* Blocks from nr on, entries b[n], that go on as the first does. */
static uint64_t run_of(const struct image *i, uint64_t nr, const uint64_t *b, uint64_t n)
{
	const struct vhdx *v = i->priv;
	uint64_t k = 1;

	while (k < n && state_of(b[k]) == state_of(b[0]) &&
		(state_of(b[0]) != FULLY_PRESENT || (place_of(b[k]) == place_of(b[0]) + k * v->block &&
			block_fits(i, nr + k, place_of(b[k])))))
		k++;
	return k;
}

static int vhdx_map(struct image *i, uint64_t off, uint64_t len, struct extent *e)
{
	const struct vhdx *v = i->priv;
	uint64_t nr = off / v->block, in = off % v->block, at = v->bat.off + (nr + nr / v->ratio) * sizeof(uint64_t), n;
	const uint64_t *b;
	struct table *t;
	int r = tables_get(v->pages, at - at % PAGE, &t);

	if (r)
		return r;
	b = (const uint64_t *)((const uint8_t *)t->data + at % PAGE);
	*e = (struct extent){ .kind = EXT_ZERO, .file = &i->file };
	switch (state_of(*b)) {
	case NOT_PRESENT:
		e->kind = EXT_HOLE;
		break;
	case UNDEFINED:
	case ZERO:
	case UNMAPPED:
		break;
	case FULLY_PRESENT:
		e->kind = EXT_DATA;
		e->pos = place_of(*b) + in;
		if (!block_fits(i, nr, place_of(*b)))
			return image_corrupt(i, "block %llu would lie at byte %llu, among the metadata or outside the file",
				(unsigned long long)nr, (unsigned long long)place_of(*b));
		break;
	case PARTIALLY_PRESENT:
	default:
		return image_corrupt(i, "block %llu has state %u, which this kind of image has not",
			(unsigned long long)nr, state_of(*b));
	}
	n = MIN((PAGE - at % PAGE) / sizeof(uint64_t), v->ratio - nr % v->ratio);
	n = MIN(n, (in + len + v->block - 1) / v->block);
	e->len = MIN(len, run_of(i, nr, b, n) * v->block - in);
	return 0;
}

/* ---- opening ---- */

static bool guid_is(const struct guid *a, const struct guid *b)
{
	return !memcmp(a, b, sizeof(*a));
}

static bool vhdx_looks(const uint8_t *head, size_t n)
{
	return n >= 8 && !memcmp(head, "vhdxfile", 8);
}

/* A range of whole megabytes behind the first one, inside the file. */
static int check_range(const struct image *i, const char *what, uint64_t off, uint64_t len, struct range *ret,
	struct error *err)
{
	if (off < MIB || off % MIB || len % MIB || !len || off > i->file.size || len > i->file.size - off)
		return error_set(err, EINVAL, "its %s would have %llu bytes at byte %llu: whole megabytes behind the first, inside the file",
			what, (unsigned long long)len, (unsigned long long)off);
	*ret = (struct range){ off, len };
	return 0;
}

static bool read_header(const struct image *i, unsigned n, uint8_t buf[HEADER_LEN], struct header *h)
{
	if (meta_read(&i->file, buf, HEADER_LEN, header_at[n]) || !checksum_holds(buf, HEADER_LEN))
		return false;
	memcpy(h, buf, sizeof(*h));
	return !memcmp(h->magic, "head", 4);
}

static int open_header(struct image *i, struct vhdx *v, struct error *err)
{
	static const struct guid none;
	uint8_t buf[2][HEADER_LEN];
	struct header h[2];
	bool ok[2];
	unsigned n;

	for (n = 0; n < 2; n++)
		ok[n] = read_header(i, n, buf[n], &h[n]);
	if (!ok[0] && !ok[1])
		return error_set(err, EINVAL, "neither of its two headers is whole (magic, checksum)");
	if (ok[0] && ok[1] && h[0].sequence == h[1].sequence && memcmp(buf[0], buf[1], HEADER_LEN))
		return error_set(err, EINVAL, "its two headers have the same sequence number and differ");
	n = !ok[0] || (ok[1] && le64toh(h[1].sequence) > le64toh(h[0].sequence));
	if (le16toh(h[n].version) != 1)
		return error_set(err, EOPNOTSUPP, "its header has version %u: 1 can be read", le16toh(h[n].version));
	if (!guid_is(&h[n].log, &none))
		return error_set(err, EOPNOTSUPP, "it was not closed properly: open it once in Hyper-V, or "
			"'qemu-img check -r all' writes out its log");
	if (!h[n].log_len)
		return 0;
	return check_range(i, "log", le64toh(h[n].log_off), le32toh(h[n].log_len), &v->log, err);
}

static int take_region(struct image *i, struct vhdx *v, const struct region_entry *e, struct error *err)
{
	bool bat = guid_is(&e->id, &bat_id), known = bat || guid_is(&e->id, &metadata_id);
	struct range *to = bat ? &v->bat : &v->metadata;

	if (!known && le32toh(e->required) & REGION_REQUIRED)
		return error_set(err, EOPNOTSUPP, "it needs a region of an unknown kind (id %02x%02x%02x%02x…)", e->id.b[3],
			e->id.b[2], e->id.b[1], e->id.b[0]);
	if (!known)
		return 0;
	if (to->len)
		return error_set(err, EINVAL, "it has two %s regions", bat ? "BAT" : "metadata");
	return check_range(i, bat ? "BAT" : "metadata region", le64toh(e->off), le32toh(e->len), to, err);
}

static int open_regions(struct image *i, struct vhdx *v, struct region_table *t, struct error *err)
{
	uint32_t count = 0;
	unsigned n;
	int r = 0;

	for (n = 0; n < 2; n++) {
		if (meta_read(&i->file, t, TABLE_LEN, regions_at[n]) || memcmp(t->magic, "regi", 4) ||
			!checksum_holds((uint8_t *)t, TABLE_LEN))
			continue;
		count = le32toh(t->count);
		break;
	}
	if (n == 2)
		return error_set(err, EINVAL, "neither of its two region tables is whole (magic, checksum)");
	if (count > ENTRIES_MAX)
		return error_set(err, EINVAL, "its region table has %u entries: at most %u", count, ENTRIES_MAX);
	for (n = 0; n < count && !r; n++)
		r = take_region(i, v, &t->entry[n], err);
	if (r)
		return r;
	if (!v->bat.len || !v->metadata.len)
		return error_set(err, EINVAL, "it has no %s region", v->bat.len ? "metadata" : "BAT");
	if (overlap(&v->bat, v->metadata.off, v->metadata.len) || overlap(&v->log, v->bat.off, v->bat.len) ||
		overlap(&v->log, v->metadata.off, v->metadata.len))
		return error_set(err, EINVAL, "its log, BAT and metadata regions overlap");
	return 0;
}

/* The bytes of each item that is there go to val[]; a parent locator only says that it is. */
static int take_item(struct image *i, const struct vhdx *v, const struct metadata_entry *e, uint8_t val[][16],
	bool *seen, struct error *err)
{
	uint32_t off = le32toh(e->off), len = le32toh(e->len);
	unsigned n = 0;

	while (n < NR_ITEMS && !guid_is(&e->id, &items[n].id))
		n++;
	if (n == NR_ITEMS) {
		if (le32toh(e->flags) & METADATA_REQUIRED)
			return error_set(err, EOPNOTSUPP, "it needs metadata of an unknown kind (id %02x%02x%02x%02x…)", e->id.b[3],
				e->id.b[2], e->id.b[1], e->id.b[0]);
		return 0;
	}
	if (n == PARENT_LOCATOR)
		return error_set(err, EOPNOTSUPP, "it holds only the changes to another image: 'Convert-VHD' or "
			"'qemu-img convert' makes a whole one of both");
	if (seen[n])
		return error_set(err, EINVAL, "its metadata has the %s twice", items[n].name);
	if (len != items[n].len || off < TABLE_LEN || off > v->metadata.len || len > v->metadata.len - off)
		return error_set(err, EINVAL, "its %s would have %u bytes at byte %u of the metadata region: %u, behind the first 64K",
			items[n].name, len, off, items[n].len);
	seen[n] = true;
	if (meta_read(&i->file, val[n], len, v->metadata.off + off))
		return error_set(err, EIO, "cannot read its %s", items[n].name);
	return 0;
}

static bool sector_size_ok(uint32_t n)
{
	return n == 512 || n == 4096;
}

static int check_geometry(struct image *i, struct vhdx *v, const uint8_t val[][16], struct error *err)
{
	uint32_t flags;
	uint64_t blocks;

	memcpy(&v->block, val[FILE_PARAMETERS], 4);
	memcpy(&flags, val[FILE_PARAMETERS] + 4, 4);
	memcpy(&i->size, val[DISK_SIZE], 8);
	memcpy(&v->logical, val[LOGICAL_SECTOR], 4);
	memcpy(&v->physical, val[PHYSICAL_SECTOR], 4);
	v->block = le32toh(v->block);
	v->logical = le32toh(v->logical);
	v->physical = le32toh(v->physical);
	i->size = le64toh(i->size);
	if (le32toh(flags) & FILE_HAS_PARENT)
		return error_set(err, EOPNOTSUPP, "it holds only the changes to another image: 'Convert-VHD' or "
			"'qemu-img convert' makes a whole one of both");
	if (v->block < BLOCK_MIN || v->block > BLOCK_MAX || v->block & (v->block - 1))
		return error_set(err, EINVAL, "its blocks have %u bytes: a power of two from 1M to 256M", v->block);
	if (!sector_size_ok(v->logical) || !sector_size_ok(v->physical))
		return error_set(err, EINVAL, "its sectors have %u bytes, physically %u: 512 or 4096", v->logical, v->physical);
	if (!i->size || i->size > IMAGE_SIZE_MAX || i->size % v->logical)
		return error_set(err, EFBIG, "its disk has %llu bytes: whole sectors, 1 to 64T", (unsigned long long)i->size);
	v->ratio = (8 * MIB) * v->logical / v->block;
	blocks = (i->size + v->block - 1) / v->block;
	if ((blocks + (blocks - 1) / v->ratio) * sizeof(uint64_t) > v->bat.len)
		return error_set(err, EINVAL, "its BAT of %llu bytes is too short for %llu blocks", (unsigned long long)v->bat.len,
			(unsigned long long)blocks);
	if (v->logical != SECTOR)
		log_warn("'%s' is a disk of 4096-byte sectors: a guest sees sectors of 512 bytes here and may not find its partitions",
			i->path);
	return 0;
}

static int open_metadata(struct image *i, struct vhdx *v, struct metadata_table *t, struct error *err)
{
	uint8_t val[NR_ITEMS][16] = { 0 };
	bool seen[NR_ITEMS] = { 0 };
	int r = meta_read(&i->file, t, TABLE_LEN, v->metadata.off);
	unsigned count = le16toh(t->count), n;

	if (r || memcmp(t->magic, "metadata", 8) || count > ENTRIES_MAX)
		return error_set(err, EINVAL, "its metadata region has no valid table");
	for (n = 0; n < count && !r; n++)
		r = take_item(i, v, &t->entry[n], val, seen, err);
	for (n = 0; n < NR_ITEMS && !r; n++)
		if (items[n].needed && !seen[n])
			r = error_set(err, EINVAL, "its metadata has no %s", items[n].name);
	return r ? r : check_geometry(i, v, (const uint8_t(*)[16])val, err);
}

static int vhdx_open(struct image *i, const struct image_how *how, struct error *err)
{
	struct vhdx *v = i->priv = calloc(1, sizeof(*v));
	auto_free void *table = malloc(TABLE_LEN);
	uint8_t magic[8];
	int r;

	(void)how;
	if (!v || !table)
		return error_set(err, ENOMEM, "out of memory");
	if (meta_read(&i->file, magic, sizeof(magic), 0) || !vhdx_looks(magic, sizeof(magic)))
		return error_set(err, EINVAL, "it is no VHDX image: no 'vhdxfile' at its start");
	r = open_header(i, v, err);
	if (!r)
		r = open_regions(i, v, table, err);
	if (!r)
		r = open_metadata(i, v, table, err);
	if (r)
		return r;
	i->cluster = v->block;
	v->pages = tables_new(i, PAGE, PAGES);
	return v->pages ? 0 : error_set(err, ENOMEM, "out of memory");
}

static void vhdx_close(struct image *i)
{
	struct vhdx *v = i->priv;

	tables_free(v ? v->pages : NULL);
	free(v);
}

static void vhdx_describe(const struct image *i, struct facts *f)
{
	const struct vhdx *v = i->priv;

	facts_u64(f, "block_size", v->block);
	facts_u64(f, "logical_sector_size", v->logical);
	facts_u64(f, "physical_sector_size", v->physical);
}

const struct format_ops vhdx_format = {
	.name = "vhdx",
	.looks = vhdx_looks,
	.open = vhdx_open,
	.close = vhdx_close,
	.map = vhdx_map,
	.describe = vhdx_describe,
};
