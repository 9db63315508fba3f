/*
 * qcow2: another size of the disk, another backing file's name.
 *
 * How this works. What the header says changes last and in one write within a sector, after everything that it then leads
 * to is on the medium. A larger disk may get its L1 table anew; what the tables still say about guest offsets past
 * the old end is made to read as zeroes before the new size is told.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "qcow2.h"

#define FORMAT_MAX 63u                  /* bytes of a backing format's name */

static uint64_t l1_needed(const struct qcow2 *q, uint64_t size)
{
	return size ? ((size - 1) >> qcow2_l1_shift(q)) + 1 : 0;
}

static uint64_t round_up(const struct qcow2 *q, uint64_t off)
{
	return (off + q->cluster - 1) & ~(uint64_t)(q->cluster - 1);
}

/* ---- larger ---- */

/* The same L1 table, with room for more, behind everything. */
static int grow_l1(struct image *i, uint64_t n, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t old = q->h.l1_offset, old_n = q->h.l1_size, clusters = qcow2_clusters(q, n * 8), first;
	auto_free uint64_t *be = calloc(clusters, q->cluster);
	bool blank;
	int r;

	if (!be)
		return error_set(err, ENOMEM, "out of memory");
	r = qcow2_take_run(i, clusters, &first, &blank);
	r = r ? r : image_flush(i);
	for (uint64_t k = 0; k < old_n; k++)
		be[k] = htobe64(q->l1[k]);
	r = r ? r : meta_write(&i->file, be, clusters << q->cluster_bits, first << q->cluster_bits);
	r = r ? r : meta_sync(&i->file);
	if (!r) {
		q->h.l1_offset = first << q->cluster_bits;
		q->h.l1_size = (uint32_t)n;
		q->header_dirty = true;
		r = image_flush(i);
	}
	if (r)
		return error_errno(err, -r, "cannot write a larger L1 table");
	r = qcow2_reopen(i, false, err);
	if (r)
		return r;
	if (old_n)
		r = qcow2_free_later(i, qcow2_index(qcow2_of(i), old), qcow2_clusters(qcow2_of(i), old_n * 8));
	r = r ? r : image_flush(i);
	return r ? error_errno(err, -r, "cannot free the old L1 table") : 0;
}

/* From where on the backing image has nothing; what is not known of one that is not open. */
static uint64_t backing_end(const struct image *i)
{
	return !qcow2_of(i)->has_backing ? 0 : i->backing ? i->backing->size : UINT64_MAX;
}

/* The new part reads as zeroes, whatever the tables, the last cluster or the backing image have there. */
static int blank_part(struct image *i, uint64_t from, uint64_t to)
{
	uint64_t step = 1ull << qcow2_l1_shift(qcow2_of(i)), below = backing_end(i);
	int r = 0;

	while (from < to && !r) {
		uint64_t end = MIN(to, (from / step + 1) * step);

		if (qcow2_of(i)->l1[from / step])
			r = image_zero(i, from, end - from, true);
		else if (from < below)
			r = image_zero(i, from, MIN(end, below) - from, true);
		from = end;
	}
	return r;
}

static int grow(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err)
{
	uint64_t old = i->size, n = l1_needed(qcow2_of(i), size);
	unsigned shift = qcow2_l1_shift(qcow2_of(i));
	int r = 0;

	if (n * 8 > QCOW2_L1_MAX)
		return error_set(err, EFBIG, "an image with clusters of %u bytes has at most %llu bytes", qcow2_of(i)->cluster,
			(unsigned long long)(QCOW2_L1_MAX / 8) << shift);
	if (n > qcow2_of(i)->h.l1_size)
		r = grow_l1(i, n, err);
	if (r)
		return r;
	/* In memory only: what is written now lies past the end that the header tells. */
	i->size = size;
	r = blank_part(i, old, size);
	if (r)
		error_errno(err, -r, "cannot clear the new part");
	if (!r && prealloc != PREALLOC_OFF)
		r = qcow2_preallocate(i, old, size, prealloc, err);
	if (!r) {
		r = image_flush(i);
		if (r)
			error_errno(err, -r, "cannot write its metadata");
	}
	if (r)
		i->size = old;
	return r;
}

/* ---- smaller ---- */

static int free_entry(struct image *i, uint64_t entry)
{
	const struct qcow2 *q = qcow2_of(i);
	uint64_t off = entry & QCOW2_OFFSET;
	uint32_t len = q->cluster;

	if (entry & QCOW2_COMPRESSED)
		qcow2_compressed_at(q, entry, &off, &len);
	else if (!off)
		return 0;
	return qcow2_free_later(i, qcow2_index(q, off), qcow2_index(q, off + len - 1) - qcow2_index(q, off) + 1);
}

/* Entries from number `from` on of the L2 table of an L1 index refer to nothing any more. */
static int cut_l2(struct image *i, uint64_t l1_index, uint64_t from)
{
	const struct qcow2 *q = qcow2_of(i);
	unsigned per = 1u << (q->slice_bits - q->entry_bits), words = 1u << (q->entry_bits - 3);
	uint64_t off;
	int r = qcow2_l2_writable(i, l1_index, &off);

	for (uint64_t n = from; n < 1ull << q->l2_bits && !r; n = (n / per + 1) * per) {
		struct table *t;
		uint64_t *e;

		r = qcow2_slice(i, q->l2, off, (unsigned)(n / per), &t);
		if (r)
			return r;
		table_pin(t);
		e = t->data;
		for (uint64_t k = n % per; k < per && !r; k++) {
			r = free_entry(i, be64toh(e[k * words]));
			if (!r)
				memset(&e[k * words], 0, 8u * words);
		}
		table_dirty(t);
		table_unpin(t);
	}
	return r;
}

/* A whole L2 table, which may be a snapshot's too. */
static int cut_l1(struct image *i, uint64_t l1_index)
{
	struct qcow2 *q = qcow2_of(i);
	unsigned words = 1u << (q->entry_bits - 3);
	uint64_t off;
	int r = qcow2_l2_offset(i, l1_index, &off);

	for (unsigned n = 0; n < 1u << (q->cluster_bits - q->slice_bits) && !r; n++) {
		struct table *t;
		const uint64_t *e;

		r = qcow2_slice(i, q->l2, off, n, &t);
		if (r)
			return r;
		table_pin(t);
		e = t->data;
		for (unsigned k = 0; k < 1u << (q->slice_bits - 3) && !r; k += words)
			r = free_entry(i, be64toh(e[k]));
		table_unpin(t);
	}
	if (r)
		return r;
	q->l1[l1_index] = 0;
	qcow2_l1_changed(q, l1_index);
	return qcow2_free_later(i, qcow2_index(q, off), 1);
}

static int shrink(struct image *i, uint64_t size, struct error *err)
{
	struct qcow2 *q = qcow2_of(i);
	uint64_t first = round_up(q, size) >> q->cluster_bits, keep = first & ((1ull << q->l2_bits) - 1);
	uint64_t index = first >> q->l2_bits;
	int r = 0;

	qcow2_forget_last(i);
	if (keep && index < q->h.l1_size && q->l1[index] & QCOW2_OFFSET)
		r = cut_l2(i, index, keep);
	for (uint64_t n = index + !!keep; n < q->h.l1_size && !r; n++) {
		if (!(q->l1[n] & QCOW2_OFFSET))
			continue;
		r = cut_l1(i, n);
		r = r ? r : image_flush(i);
	}
	r = r ? r : image_flush(i);
	if (r)
		return error_errno(err, -r, "cannot free what is cut off");
	i->size = size;
	return 0;
}

/* ---- both ---- */

static int refuse(const struct image *i, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);

	if (q->refs_bad)
		return error_set(err, EIO, "its refcounts make no sense ('vmm disk check --repair all' mends them)");
	if (q->h.snapshots && q->h.version < 3)
		return error_set(err, EOPNOTSUPP, "it has snapshots, and in version 2 they do not say their size: "
			"delete them, or convert it to version 3");
	return 0;
}

int qcow2_resize(struct image *i, uint64_t size, enum image_prealloc prealloc, struct error *err)
{
	int r = refuse(i, err);

	if (!r && prealloc != PREALLOC_OFF && size < i->size)
		r = error_set(err, EINVAL, "preallocation is for a disk that grows");
	if (!r && size == i->size)
		return 0;
	if (!r) {
		r = image_flush(i);
		if (r)
			error_errno(err, -r, "cannot write its metadata");
	}
	if (!r)
		r = size > i->size ? grow(i, size, prealloc, err) : shrink(i, size, err);
	if (!r) {
		qcow2_of(i)->h.size = size;
		qcow2_of(i)->header_dirty = true;
		r = image_flush(i);
		r = r ? error_errno(err, -r, "cannot write the header") : qcow2_metadata_rebuild(i);
	}
	if (r)
		error_prefix(err, "'%s': ", i->path);
	return r;
}

/* ---- the backing file's name ---- */

/* All header extensions but the backing format, and a new one; then the end mark. Bytes, or 0: no room in out[room]. */
static size_t put_extensions(const struct qcow2 *q, const char *format, uint8_t *out, size_t room)
{
	size_t at = 0, len = format ? strlen(format) : 0;
	uint32_t word[2] = { htobe32(QCOW2_EXT_BACKING_FORMAT), htobe32((uint32_t)len) };

	if (format) {
		if (room < 8 + len + 8 + 8)
			return 0;
		memcpy(out, word, sizeof(word));
		memcpy(out + 8, format, len);
		at = 8 + ((len + 7) & ~(size_t)7);
	}
	for (size_t from = 0; from + 8 <= q->ext_len;) {
		size_t n;

		memcpy(word, q->ext + from, sizeof(word));
		n = 8 + (((size_t)be32toh(word[1]) + 7) & ~(size_t)7);
		n = MIN(n, q->ext_len - from);
		if (be32toh(word[0]) != QCOW2_EXT_BACKING_FORMAT) {
			if (room - at < n + 8 + 8)
				return 0;
			memcpy(out + at, q->ext + from, n);
			at += (n + 7) & ~(size_t)7;
		}
		from += n;
	}
	return at + 8;
}

/* Where the name goes: behind the extensions, and if there is room not over the old one. 0: no room. */
static size_t name_place(const struct qcow2 *q, size_t ext_end, size_t len)
{
	size_t old = q->h.backing_offset, old_end = old + q->h.backing_length;

	if (old && ext_end < old_end && ext_end + len > old && old_end <= q->cluster && old_end + len <= q->cluster)
		return old_end;
	return ext_end + len <= q->cluster ? ext_end : 0;
}

static int write_first_cluster(struct image *i, const uint8_t *c, size_t ext_end, size_t name, size_t len)
{
	const struct qcow2 *q = qcow2_of(i);
	int r = len ? meta_write(&i->file, c + name, len, name) : 0;

	r = r ? r : meta_sync(&i->file);
	r = r ? r : meta_write(&i->file, c, ext_end, 0);
	r = r ? r : meta_sync(&i->file);
	r = r ? r : meta_write(&i->file, c, q->cluster, 0);     /* nothing left of the old name */
	return r ? r : meta_sync(&i->file);
}

static int set_name(struct image *i, const char *name, const char *format, struct error *err)
{
	const struct qcow2 *q = qcow2_of(i);
	struct qcow2_header h = q->h;
	size_t head = MAX(h.version >= 3 ? h.header_length : QCOW2_V2_LENGTH, QCOW2_V2_LENGTH), ext, at = 0, len;
	auto_free uint8_t *c = calloc(1, q->cluster);
	uint8_t bytes[QCOW2_HEAD];
	int r;

	len = name ? strlen(name) : 0;
	if (!c)
		return error_set(err, ENOMEM, "out of memory");
	if (head > q->cluster)
		return error_set(err, EIO, "its header of %zu bytes makes no sense", head);
	ext = put_extensions(q, format, c + head, q->cluster - head);
	if (name && ext)
		at = name_place(q, head + ext, len);
	if (!ext || (name && !at))
		return error_set(err, ENOSPC, "the header has no room for a backing file name of %zu bytes "
			"(clusters of %u bytes)", len, q->cluster);
	h.backing_offset = at;
	h.backing_length = (uint32_t)len;
	r = meta_read_all(&i->file, c, head, 0);
	if (r)
		return error_errno(err, -r, "cannot read the header");
	qcow2_header_to_disk(&h, bytes);
	memcpy(c, bytes, qcow2_header_written(&h));
	if (name)
		memcpy(c + at, name, len);
	r = write_first_cluster(i, c, head + ext, at, len);
	return r ? error_errno(err, -r, "cannot write the header") : qcow2_reopen(i, false, err);
}

int qcow2_set_backing(struct image *i, const char *name, const char *format, struct error *err)
{
	int r = 0;

	if (!name != !format)
		r = error_set(err, EINVAL, "a backing file needs a name and a format");
	else if (name && (!*name || strlen(name) > QCOW2_NAME_MAX))
		r = error_set(err, EINVAL, "a backing file's name has 1 to %u bytes, not %zu", QCOW2_NAME_MAX, strlen(name));
	else if (name && (!*format || strlen(format) > FORMAT_MAX))
		r = error_set(err, EINVAL, "a backing format's name has 1 to %u bytes", FORMAT_MAX);
	if (!r) {
		r = image_flush(i);
		r = r ? error_errno(err, -r, "cannot write its metadata") : set_name(i, name, format, err);
	}
	if (r)
		error_prefix(err, "'%s': ", i->path);
	return r;
}
