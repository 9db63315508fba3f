/*
 * The qcow2 format: opening an image, and where each guest byte lies. See qcow2.h.
 *
 * Everything in the file is hostile. The header is copied once and checked; a table is looked at entry by entry as it
 * is used, and an entry that makes no sense is -EIO for the request that met it.
 */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"
#include "qcow2.h"

#define SLICE_BITS_MAX 12u
#define L2_CACHE       (6u << 20)
#define REFS_CACHE     (1u << 20)
#define TABLES_MAX     4096u            /* of either cache, where slices are small */
#define ZSTD_WINDOW    23               /* log2 of the largest window a frame may ask for */

/* ---- the header ---- */

void qcow2_header_from_disk(const uint8_t in[QCOW2_HEAD], struct qcow2_header *h)
{
	struct qcow2_header d;

	_Static_assert(sizeof(d) == QCOW2_HEAD, "header");
	memcpy(&d, in, sizeof(d));
	*h = (struct qcow2_header){ .magic = be32toh(d.magic), .version = be32toh(d.version),
		.backing_offset = be64toh(d.backing_offset), .backing_length = be32toh(d.backing_length),
		.cluster_bits = be32toh(d.cluster_bits), .size = be64toh(d.size),
		.crypt_method = be32toh(d.crypt_method), .l1_size = be32toh(d.l1_size),
		.l1_offset = be64toh(d.l1_offset), .refcount_offset = be64toh(d.refcount_offset),
		.refcount_clusters = be32toh(d.refcount_clusters), .snapshots = be32toh(d.snapshots),
		.snapshots_offset = be64toh(d.snapshots_offset), .refcount_order = 4,
		.header_length = QCOW2_V2_LENGTH };
	if (h->version < 3)
		return;
	h->incompatible = be64toh(d.incompatible);
	h->compatible = be64toh(d.compatible);
	h->autoclear = be64toh(d.autoclear);
	h->refcount_order = be32toh(d.refcount_order);
	h->header_length = be32toh(d.header_length);
	if (h->header_length > QCOW2_V3_LENGTH) {
		h->compression_type = d.compression_type;
		memcpy(h->padding, d.padding, sizeof(h->padding));
	}
}

void qcow2_header_to_disk(const struct qcow2_header *h, uint8_t out[QCOW2_HEAD])
{
	struct qcow2_header d = { .magic = htobe32(h->magic), .version = htobe32(h->version),
		.backing_offset = htobe64(h->backing_offset), .backing_length = htobe32(h->backing_length),
		.cluster_bits = htobe32(h->cluster_bits), .size = htobe64(h->size),
		.crypt_method = htobe32(h->crypt_method), .l1_size = htobe32(h->l1_size),
		.l1_offset = htobe64(h->l1_offset), .refcount_offset = htobe64(h->refcount_offset),
		.refcount_clusters = htobe32(h->refcount_clusters), .snapshots = htobe32(h->snapshots),
		.snapshots_offset = htobe64(h->snapshots_offset), .incompatible = htobe64(h->incompatible),
		.compatible = htobe64(h->compatible), .autoclear = htobe64(h->autoclear),
		.refcount_order = htobe32(h->refcount_order), .header_length = htobe32(h->header_length),
		.compression_type = h->compression_type };

	memcpy(d.padding, h->padding, sizeof(d.padding));
	memcpy(out, &d, sizeof(d));
}

unsigned qcow2_header_written(const struct qcow2_header *h)
{
	return MIN(h->header_length, QCOW2_HEAD);
}

static int check_shape(const struct qcow2_header *h, struct error *err)
{
	if (h->magic != QCOW2_MAGIC)
		return error_set(err, EINVAL, "it is not a qcow2 image");
	if (h->version != 2 && h->version != 3)
		return error_set(err, EINVAL, "it is a qcow2 image of version %u: versions 2 and 3 can be used", h->version);
	if (h->cluster_bits < 9 || h->cluster_bits > 21)
		return error_set(err, EINVAL, "its clusters have 2^%u bytes: 2^9 to 2^21 is possible", h->cluster_bits);
	if (h->version == 3 && (h->header_length < QCOW2_V3_LENGTH || h->header_length % 8 ||
			h->header_length > 1u << h->cluster_bits))
		return error_set(err, EINVAL, "its header says it is %u bytes long", h->header_length);
	if (h->refcount_order > 6)
		return error_set(err, EINVAL, "its refcounts have 2^%u bits: 2^0 to 2^6 is possible", h->refcount_order);
	if (h->crypt_method)
		return error_set(err, EOPNOTSUPP, "it is encrypted (%s), which is not supported: 'qemu-img convert' "
			"makes a plain copy", h->crypt_method == 2 ? "LUKS" : "AES");
	if (h->size > IMAGE_SIZE_MAX)
		return error_set(err, EFBIG, "it is a disk of %llu bytes: 64 TiB is the most", (unsigned long long)h->size);
	return 0;
}

/* What the image itself calls an unknown feature; text that is not plain is not shown. */
static void feature_name(const struct qcow2 *q, unsigned bit, char out[64])
{
	snprintf(out, 64, "bit %u", bit);
	for (uint32_t at = 0; at + 8 <= q->ext_len;) {
		uint32_t type, len;

		memcpy(&type, q->ext + at, 4);
		memcpy(&len, q->ext + at + 4, 4);
		type = be32toh(type);
		len = be32toh(len);
		at += 8;
		for (uint32_t n = 0; type == QCOW2_EXT_FEATURES && n + 48 <= len; n += 48) {
			const uint8_t *f = q->ext + at + n;
			unsigned k = 0;

			while (k < 46 && f[2 + k] >= ' ' && f[2 + k] < 0x7f)
				k++;
			if (f[0] == 0 && f[1] == bit && k && (k == 46 || !f[2 + k]))
				snprintf(out, 64, "bit %u, '%.46s'", bit, (const char *)f + 2);
		}
		at += (len + 7) & ~7u;
	}
}

static int check_features(const struct qcow2 *q, struct error *err)
{
	const struct qcow2_header *h = &q->h;
	uint64_t known = QCOW2_DIRTY | QCOW2_CORRUPT | QCOW2_COMPRESSION | QCOW2_EXT_L2;
	uint64_t unknown = h->incompatible & ~known & ~(uint64_t)QCOW2_DATA_FILE;
	char name[64];

	if (unknown) {
		feature_name(q, (unsigned)__builtin_ctzll(unknown), name);
		return error_set(err, EOPNOTSUPP, "it uses a feature that is not known here (%s)", name);
	}
	if (h->incompatible & QCOW2_DATA_FILE)
		return error_set(err, EOPNOTSUPP, "its data lies in another file (data_file), which is not supported: "
			"'qemu-img convert' makes an image of one file");
	if (h->incompatible & QCOW2_EXT_L2 && h->cluster_bits < 14)
		return error_set(err, EINVAL, "extended L2 entries need clusters of 16K or more: these have %u bytes",
			1u << h->cluster_bits);
	if (h->compression_type > 1 || !!(h->incompatible & QCOW2_COMPRESSION) != !!h->compression_type)
		return error_set(err, EINVAL, "its compression type is %u: 0 (zlib) and 1 (zstd) are known",
			h->compression_type);
	return 0;
}

/* May it be written to? */
static int check_writing(const struct qcow2 *q, const struct image_how *how, struct error *err)
{
	if (q->h.autoclear & QCOW2_BITMAPS)
		return error_set(err, EROFS, "it has persistent bitmaps, which a write would make wrong: it can be read (ro), "
			"or 'qemu-img bitmap --remove' takes them out");
	if (how->repair)
		return 0;
	if (q->h.incompatible & QCOW2_CORRUPT)
		return error_set(err, EROFS, "it is marked as corrupt: it can be read (ro), or mended "
			"('vmm disk check --repair all')");
	if (q->h.incompatible & QCOW2_DIRTY)
		return error_set(err, EROFS, "it was not closed properly and its refcounts may be wrong: "
			"'vmm disk check --repair all' mends it; it can be read (ro)");
	return 0;
}

static int read_extensions(struct image *i, const uint8_t *head, size_t n, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t begin = q->h.header_length, end = q->cluster, at = begin;

	if (q->h.backing_offset > begin && q->h.backing_offset < end)
		end = q->h.backing_offset;
	while (at < end && end - at >= 8) {
		uint32_t type, len;
		uint64_t room;

		if (n < at + 8)
			return error_set(err, EINVAL, "its header extensions take more than %u bytes", QCOW2_EXT_MAX);
		memcpy(&type, head + at, 4);
		memcpy(&len, head + at + 4, 4);
		type = be32toh(type);
		len = be32toh(len);
		if (type == QCOW2_EXT_END)
			break;
		room = end - at - 8;
		if (len > room || n - at - 8 < len)
			return error_set(err, EINVAL, "header extension 0x%08x says it has %u bytes, which is more than there are",
				type, len);
		if (type == QCOW2_EXT_BACKING_FORMAT && len && len < 64 && !memchr(head + at + 8, 0, len)) {
			free(i->backing_format);
			i->backing_format = strndup((const char *)head + at + 8, len);
			if (!i->backing_format)
				return error_set(err, ENOMEM, "out of memory");
		}
		at += 8 + MIN(((uint64_t)len + 7) & ~7ull, room);
	}
	q->ext_len = at > begin ? (uint32_t)(at - begin) : 0;
	q->ext = malloc(q->ext_len + 8);
	if (!q->ext)
		return error_set(err, ENOMEM, "out of memory");
	memcpy(q->ext, head + begin, q->ext_len);
	return 0;
}

static int read_backing_name(struct image *i, const uint8_t *head, size_t n, struct error *err)
{
	const struct qcow2_header *h = &qcow2_of(i)->h;
	char name[QCOW2_NAME_MAX + 1] = "";
	uint32_t len = h->backing_length, cluster = qcow2_of(i)->cluster;
	int r = 0;

	if (!h->backing_offset || !len)
		return 0;
	if (len > QCOW2_NAME_MAX)
		return error_set(err, EINVAL, "the name of its backing file has %u bytes: %u are the most", len, QCOW2_NAME_MAX);
	if (h->backing_offset < h->header_length || h->backing_offset > cluster || len > cluster - h->backing_offset)
		return error_set(err, EINVAL, "the name of its backing file does not lie in its first cluster");
	if (n >= h->backing_offset + len)
		memcpy(name, head + h->backing_offset, len);
	else
		r = meta_read_all(&i->file, name, len, h->backing_offset);
	if (r)
		return error_errno(err, -r, "the name of its backing file cannot be read");
	if (strlen(name) != len)
		return error_set(err, EINVAL, "the name of its backing file has a NUL in it");
	i->backing_name = strdup(name);
	qcow2_of(i)->has_backing = true;
	return i->backing_name ? 0 : error_set(err, ENOMEM, "out of memory");
}

/* A table of bytes at off lies in the file, in whole clusters. */
static bool in_file(const struct image *i, uint64_t off, uint64_t bytes)
{
	const struct qcow2 *q = qcow2_of(i);

	return !(off & (q->cluster - 1)) && off >= q->cluster && off <= i->file.size && bytes <= i->file.size - off;
}

static int read_l1(struct image *i, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t bytes = q->h.l1_size * 8ull, span = 1ull << qcow2_l1_shift(q);
	uint64_t room = (bytes + SECTOR - 1) / SECTOR * SECTOR, bits = (room / SECTOR + 63) / 64 * 8;
	int r;

	if (bytes > QCOW2_L1_MAX)
		return error_set(err, EFBIG, "its L1 table has %u entries: %u are the most", q->h.l1_size, QCOW2_L1_MAX / 8);
	if (q->h.l1_size < (q->h.size + span - 1) / span)
		return error_set(err, EINVAL, "its L1 table has %u entries, too few for %llu bytes", q->h.l1_size,
			(unsigned long long)q->h.size);
	if (bytes && !in_file(i, q->h.l1_offset, bytes))
		return error_set(err, EINVAL, "its L1 table (at 0x%llx) does not lie in the file",
			(unsigned long long)q->h.l1_offset);
	q->l1 = calloc(1, room + 8);
	q->l1_dirty = calloc(1, bits + 8);
	q->l1_sent = calloc(1, bits + 8);
	q->l1_checked = calloc(q->h.l1_size / 64 + 1, 8);
	if (!q->l1 || !q->l1_dirty || !q->l1_sent || !q->l1_checked)
		return error_set(err, ENOMEM, "no memory for its L1 table");
	r = bytes ? meta_read_all(&i->file, q->l1, bytes, q->h.l1_offset) : 0;
	if (r)
		return error_errno(err, -r, "its L1 table cannot be read");
	for (uint32_t k = 0; k < q->h.l1_size; k++)
		q->l1[k] = be64toh(q->l1[k]);
	return 0;
}

static int check_snapshots(const struct image *i, struct error *err)
{
	const struct qcow2_header *h = &qcow2_of(i)->h;

	if (!h->snapshots)
		return 0;
	if (h->snapshots > QCOW2_SNAPSHOTS_MAX)
		return error_set(err, EFBIG, "it has %u snapshots: %u are the most", h->snapshots, QCOW2_SNAPSHOTS_MAX);
	if (!in_file(i, h->snapshots_offset, h->snapshots * 40ull))
		return error_set(err, EINVAL, "its table of snapshots (at 0x%llx) does not lie in the file",
			(unsigned long long)h->snapshots_offset);
	return 0;
}

/* Refcounts are needed to write; without them there is still the data. */
static int check_refcount_table(struct image *i, const struct image_how *how, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t bytes = (uint64_t)q->h.refcount_clusters << q->cluster_bits;

	if (bytes && bytes <= QCOW2_RT_MAX && in_file(i, q->h.refcount_offset, bytes))
		return 0;
	q->refs_bad = true;
	if (!how->readonly && !how->repair)
		return error_set(err, EIO, "its refcount table (at 0x%llx, %u clusters) makes no sense: it can be read (ro), or mended "
			"('vmm disk check --repair all')", (unsigned long long)q->h.refcount_offset, q->h.refcount_clusters);
	log_warn("'%s': its refcount table makes no sense; 'vmm disk check' tells more", i->path);
	return 0;
}

static void set_geometry(struct qcow2 *q)
{
	bool ext = q->h.incompatible & QCOW2_EXT_L2;

	q->cluster_bits = q->h.cluster_bits;
	q->cluster = 1u << q->cluster_bits;
	q->entry_bits = ext ? 4 : 3;
	q->l2_bits = q->cluster_bits - q->entry_bits;
	q->slice_bits = MIN(q->cluster_bits, SLICE_BITS_MAX);
	q->refs_bits = q->cluster_bits + 3 - q->h.refcount_order;
	q->refs_max = q->h.refcount_order == 6 ? INT64_MAX : (1ull << (1u << q->h.refcount_order)) - 1;
	q->sub_bits = ext ? q->cluster_bits - 5 : q->cluster_bits;
}

int qcow2_attach(struct image *i, const struct image_how *how, const uint8_t *head, size_t n, struct error *err)
{
	struct qcow2 *q = calloc(1, sizeof(*q));
	int r;

	if (!q)
		return error_set(err, ENOMEM, "out of memory");
	i->priv = q;
	qcow2_header_from_disk(head, &q->h);
	r = check_shape(&q->h, err);
	if (r)
		return r;
	set_geometry(q);
	i->cluster = q->cluster;
	i->size = q->h.size - q->h.size % SECTOR;
	r = read_extensions(i, head, n, err);
	r = r ? r : check_features(q, err);
	r = r ? r : how->readonly ? 0 : check_writing(q, how, err);
	r = r ? r : read_backing_name(i, head, n, err);
	r = r ? r : read_l1(i, err);
	r = r ? r : check_snapshots(i, err);
	r = r ? r : check_refcount_table(i, how, err);
	if (r)
		return r;
	q->l2 = tables_new(i, 1u << q->slice_bits, MIN(L2_CACHE >> q->slice_bits, TABLES_MAX));
	q->refs = tables_new(i, 1u << q->slice_bits, MIN(REFS_CACHE >> q->slice_bits, TABLES_MAX));
	if (!q->l2 || !q->refs)
		return error_set(err, ENOMEM, "out of memory");
	return how->readonly ? 0 : qcow2_refs_open(i, how, err);
}

/* The bits that say "true as long as only those write who know me". */
static int clear_autoclear(struct image *i, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint8_t head[QCOW2_HEAD];
	int r;

	if (!q->h.autoclear)
		return 0;
	q->h.autoclear = 0;
	qcow2_header_to_disk(&q->h, head);
	r = meta_write(&i->file, head, qcow2_header_written(&q->h), 0);
	r = r ? r : meta_sync(&i->file);
	return r ? error_errno(err, -r, "its header cannot be written") : 0;
}

static int qcow2_open(struct image *i, const struct image_how *how, struct error *err)
{
	size_t n = QCOW2_EXT_MAX + 4096;
	auto_free uint8_t *head = malloc(n);
	int r;

	if (!head)
		return error_set(err, ENOMEM, "out of memory");
	if (i->file.size < QCOW2_V2_LENGTH)
		return error_set(err, EINVAL, "it is not a qcow2 image: it has only %llu bytes",
			(unsigned long long)i->file.size);
	r = meta_read(&i->file, head, n, 0);
	if (r)
		return error_errno(err, -r, "its header cannot be read");
	r = qcow2_attach(i, how, head, n, err);
	return r || how->readonly ? r : clear_autoclear(i, err);
}

static void qcow2_close(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);

	if (!q)
		return;
	qcow2_refs_close(i);
	tables_free(q->l2);
	tables_free(q->refs);
	free(q->l1);
	free(q->l1_dirty);
	free(q->l1_sent);
	free(q->l1_checked);
	free(q->ext);
	free(q);
	i->priv = NULL;
}

static bool qcow2_looks(const uint8_t *head, size_t n)
{
	return n >= 8 && !memcmp(head, "QFI\xfb\0\0\0", 7) && (head[7] == 2 || head[7] == 3);
}

static void qcow2_describe(const struct image *i, struct facts *f)
{
	const struct qcow2 *q = qcow2_of(i);

	facts_u64(f, "version", q->h.version);
	facts_u64(f, "cluster_size", q->cluster);
	facts_u64(f, "refcount_bits", 1u << q->h.refcount_order);
	facts_str(f, "compression_type", q->h.compression_type ? "zstd" : "zlib");
	facts_bool(f, "extended_l2", q->entry_bits == 4);
	facts_bool(f, "lazy_refcounts", q->h.compatible & QCOW2_LAZY_REFCOUNTS);
	facts_bool(f, "dirty", q->h.incompatible & QCOW2_DIRTY);
	facts_bool(f, "corrupt", i->corrupt || q->h.incompatible & QCOW2_CORRUPT);
	facts_bool(f, "bitmaps", q->h.autoclear & QCOW2_BITMAPS);
	facts_u64(f, "snapshots", q->h.snapshots);
}

/* ---- the map ---- */

void qcow2_forget_last(struct image *i)
{
	struct qcow2 *q = qcow2_of(i);

	if (q->last)
		table_unpin(q->last);
	q->last = NULL;
}

int qcow2_l2_offset(struct image *i, uint64_t l1_index, uint64_t *l2_off)
{
	const struct qcow2 *q = qcow2_of(i);
	uint64_t entry = l1_index < q->h.l1_size ? q->l1[l1_index] : 0, off = entry & QCOW2_OFFSET;

	*l2_off = off;
	if (!entry)
		return 0;
	if (entry & QCOW2_L1_RESERVED || off & (q->cluster - 1) || !off || off >= i->file.size)
		return qcow2_corrupt(i, "entry %llu of its L1 table is 0x%llx", (unsigned long long)l1_index,
			(unsigned long long)entry);
	return 0;
}

int qcow2_slice(struct image *i, struct tables *of, uint64_t table_off, unsigned n, struct table **ret)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t off = table_off + ((uint64_t)n << q->slice_bits);
	struct qcow2_fresh *f = q->fresh_n ? q->fresh[qcow2_index(q, table_off) % QCOW2_FRESH] : NULL;
	int r;

	while (f && f->off != table_off)
		f = f->next;
	if (!f || f->made[n / 64] & 1ull << n % 64)
		return tables_get(of, off, ret);
	r = tables_make(of, off, ret);
	if (!r)
		f->made[n / 64] |= 1ull << n % 64;
	return r;
}

int qcow2_find_slice(struct image *i, uint64_t g, struct table **t, unsigned *at)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned in_slice = q->slice_bits - q->entry_bits;
	uint64_t l2_off, first = g >> in_slice << in_slice;
	int r;

	*at = (unsigned)(g - first);
	if (q->last && q->last_first == first) {
		*t = q->last;
		return 0;
	}
	r = qcow2_l2_offset(i, g >> q->l2_bits, &l2_off);
	*t = NULL;
	if (r || !l2_off)
		return r;
	r = qcow2_slice(i, q->l2, l2_off, (unsigned)(g & ((1ull << q->l2_bits) - 1)) >> in_slice, t);
	if (r)
		return r;
	qcow2_forget_last(i);
	q->last = *t;
	q->last_first = first;
	table_pin(q->last);
	return 0;
}

void qcow2_compressed_at(const struct qcow2 *q, uint64_t entry, uint64_t *off, uint32_t *len)
{
	unsigned shift = 62 - (q->cluster_bits - 8);
	uint64_t sectors = (entry >> shift & ((1u << (q->cluster_bits - 8)) - 1)) + 1;

	*off = entry & ((1ull << shift) - 1);
	*len = (uint32_t)(sectors * SECTOR - (*off & (SECTOR - 1)));
}

static uint64_t load(const struct table *t, unsigned n)
{
	return be64toh(((const uint64_t *)t->data)[n]);
}

int qcow2_bad_entry(struct image *i, uint64_t g, uint64_t entry)
{
	return qcow2_corrupt(i, "the L2 entry of guest cluster %llu is 0x%llx", (unsigned long long)g,
		(unsigned long long)entry);
}

bool qcow2_sane(const struct qcow2 *q, uint64_t entry)
{
	uint64_t reserved = QCOW2_L2_RESERVED | (q->h.version < 3 || q->entry_bits == 4 ? QCOW2_ZERO : 0);

	return !(entry & reserved) && !(entry & QCOW2_OFFSET & (q->cluster - 1)) &&
		(entry & QCOW2_OFFSET || !(entry & QCOW2_COPIED));
}

/* [pos, pos + len) as far as the file has it. */
static void clip_to_file(struct image *i, struct extent *e)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t left;

	if (e->pos < i->file.size) {
		left = (i->file.size - e->pos + SECTOR - 1) / SECTOR * SECTOR;
		e->len = MIN(e->len, left);
		return;
	}
	e->kind = EXT_ZERO;
	if (!q->warned_end)
		log_warn("'%s' has data at 0x%llx, past the end of the file: it reads as zeroes ('vmm disk check' tells more)",
			i->path, (unsigned long long)e->pos);
	q->warned_end = true;
}

static int map_compressed(struct image *i, uint64_t g, uint64_t entry, uint64_t skip, struct extent *e)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t off;
	uint32_t len;

	qcow2_compressed_at(q, entry, &off, &len);
	if (off < q->cluster || off >= i->file.size)
		return qcow2_bad_entry(i, g, entry);
	*e = (struct extent){ .kind = EXT_COMPRESSED, .len = q->cluster - skip, .pos = off, .file = &i->file,
		.csize = (uint32_t)MIN(len, i->file.size - off), .skip = (uint32_t)skip };
	return 0;
}

static enum extent_kind kind_of(uint64_t entry)
{
	return entry & QCOW2_ZERO ? EXT_ZERO : entry & QCOW2_OFFSET ? EXT_DATA : EXT_HOLE;
}

static int map_clusters(struct image *i, const struct table *t, unsigned at, uint64_t off, uint64_t len, struct extent *e)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned most = 1u << (q->slice_bits - q->entry_bits);
	uint64_t g = qcow2_index(q, off), skip = off & (q->cluster - 1), entry = load(t, at), next;

	if (entry & QCOW2_COMPRESSED)
		return map_compressed(i, g, entry, skip, e);
	if (!qcow2_sane(q, entry))
		return qcow2_bad_entry(i, g, entry);
	*e = (struct extent){ .kind = kind_of(entry), .len = q->cluster - skip, .file = &i->file,
		.pos = (entry & QCOW2_OFFSET) + skip };
	while (e->len < len && ++at < most) {
		next = load(t, at);
		if (next & QCOW2_COMPRESSED || !qcow2_sane(q, next) || kind_of(next) != e->kind)
			break;
		if (e->kind == EXT_DATA && (next & QCOW2_OFFSET) != e->pos + e->len)
			break;
		e->len += q->cluster;
	}
	if (e->kind == EXT_DATA)
		clip_to_file(i, e);
	return 0;
}

/* Subcluster s: its kind, or -1 where the entry makes no sense. */
static int sub_kind(const struct qcow2 *q, uint64_t entry, uint64_t bitmap, unsigned s)
{
	bool data = bitmap >> s & 1, zero = bitmap >> (32 + s) & 1;

	if (!qcow2_sane(q, entry) || (data && zero) || (data && !(entry & QCOW2_OFFSET)))
		return -1;
	return data ? EXT_DATA : zero ? EXT_ZERO : EXT_HOLE;
}

static int map_subclusters(struct image *i, const struct table *t, unsigned at, uint64_t off, uint64_t len,
	struct extent *e)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned most = 1u << (q->slice_bits - q->entry_bits), s;
	uint64_t g = qcow2_index(q, off), skip = off & (q->cluster - 1), entry = load(t, at * 2);
	uint64_t sub = 1ull << q->sub_bits;
	int kind;

	if (entry & QCOW2_COMPRESSED)
		return map_compressed(i, g, entry, skip, e);
	s = (unsigned)(skip >> q->sub_bits);
	kind = sub_kind(q, entry, load(t, at * 2 + 1), s);
	if (kind < 0)
		return qcow2_bad_entry(i, g, entry);
	*e = (struct extent){ .kind = (enum extent_kind)kind, .len = sub - (skip & (sub - 1)), .file = &i->file,
		.pos = (entry & QCOW2_OFFSET) + skip };
	while (e->len < len) {
		if (++s == 32) {
			s = 0;
			if (++at == most)
				break;
			entry = load(t, at * 2);
			if (entry & QCOW2_COMPRESSED)
				break;
		}
		if (sub_kind(q, entry, load(t, at * 2 + 1), s) != kind)
			break;
		if (kind == EXT_DATA && (entry & QCOW2_OFFSET) + ((uint64_t)s << q->sub_bits) != e->pos + e->len)
			break;
		e->len += sub;
	}
	if (e->kind == EXT_DATA)
		clip_to_file(i, e);
	return 0;
}

static int qcow2_map(struct image *i, uint64_t off, uint64_t len, struct extent *e)
{
	struct qcow2 *q = qcow2_of(i);
	struct table *t;
	unsigned at;
	int r = qcow2_find_slice(i, qcow2_index(q, off), &t, &at);

	if (r)
		return r;
	if (!t) {
		uint64_t span = 1ull << qcow2_l1_shift(q);

		*e = (struct extent){ .kind = EXT_HOLE, .len = span - (off & (span - 1)) };
		return 0;
	}
	return q->entry_bits == 4 ? map_subclusters(i, t, at, off, len, e) : map_clusters(i, t, at, off, len, e);
}

/* ---- compressed clusters ---- */

static int inflate_cluster(const void *z, size_t n, void *out, size_t size)
{
	z_stream s = { .next_in = (Bytef *)z, .avail_in = (uInt)n, .next_out = out, .avail_out = (uInt)size };
	int r;

	if (inflateInit2(&s, -15) != Z_OK)
		return -EIO;
	r = inflate(&s, Z_FINISH);
	inflateEnd(&s);
	/* The input may go on after the end, to the end of its sector; the output may not. */
	return (r == Z_STREAM_END || r == Z_BUF_ERROR) && !s.avail_out ? 0 : -EIO;
}

static int zstd_cluster(const void *z, size_t n, void *out, size_t size)
{
	ZSTD_inBuffer in = { z, n, 0 };
	ZSTD_outBuffer to = { out, size, 0 };
	ZSTD_DCtx *c = ZSTD_createDCtx();
	size_t r = 0;

	if (!c)
		return -EIO;
	ZSTD_DCtx_setParameter(c, ZSTD_d_windowLogMax, ZSTD_WINDOW);
	while (to.pos < size) {
		size_t from = in.pos, at = to.pos;

		r = ZSTD_decompressStream(c, &to, &in);
		if (ZSTD_isError(r) || (in.pos == from && to.pos == at))
			break;
	}
	ZSTD_freeDCtx(c);
	return to.pos == size && !ZSTD_isError(r) ? 0 : -EIO;
}

static int qcow2_decompress(const struct image *i, const void *z, size_t n, void *out)
{
	const struct qcow2 *q = i->priv;

	if (n > 2ull * q->cluster)
		return -EIO;
	return q->h.compression_type ? zstd_cluster(z, n, out, q->cluster) : inflate_cluster(z, n, out, q->cluster);
}

const struct format_ops qcow2_format = {
	.name = "qcow2",
	.looks = qcow2_looks,
	.open = qcow2_open,
	.close = qcow2_close,
	.map = qcow2_map,
	.decompress = qcow2_decompress,
	.alloc = qcow2_alloc,
	.link = qcow2_link,
	.drop = qcow2_drop,
	.punch = qcow2_punch,
	.gather = qcow2_gather,
	.gathered = qcow2_gathered,
	.reclaim = qcow2_reclaim,
	.write_compressed = qcow2_write_compressed,
	.compress = qcow2_compress,
	.write_packed = qcow2_write_packed,
	.use_snapshot = qcow2_use_snapshot,
	.create = qcow2_create,
	.describe = qcow2_describe,
	.resize = qcow2_resize,
	.check = qcow2_check,
	.snapshots = qcow2_snapshots,
	.snapshot_create = qcow2_snapshot_create,
	.snapshot_apply = qcow2_snapshot_apply,
	.snapshot_delete = qcow2_snapshot_delete,
	.set_backing = qcow2_set_backing,
};
