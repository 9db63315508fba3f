/*
 * qcow2: new images. See qcow2.h.
 *
 * The file is laid out as header, refcount table, refcount blocks, L1 table; what is preallocated is then written as
 * under a guest. The magic in the first four bytes stays 0 until everything else is on the medium.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "qcow2.h"

#define DEFAULT_CLUSTER (64u << 10)

struct layout {
	struct qcow2_header h;
	uint64_t table, blocks, l1;     /* clusters of each */
	uint64_t total;
};

/* ---- what is asked for ---- */

static int check_options(const struct image_create *c, struct error *err)
{
	uint32_t cluster = c->cluster ? c->cluster : DEFAULT_CLUSTER, bits = c->refcount_bits;

	if (c->version && c->version != 2 && c->version != 3)
		return error_set(err, EINVAL, "qcow2 has the versions 2 and 3, not %u", c->version);
	if (cluster < 512 || cluster > 2u << 20 || cluster & (cluster - 1))
		return error_set(err, EINVAL, "clusters of %u bytes: a power of two from 512 to 2M is possible", cluster);
	if (bits && (bits > 64 || bits & (bits - 1)))
		return error_set(err, EINVAL, "refcounts of %u bits: 1, 2, 4, 8, 16, 32 or 64 is possible", bits);
	if (c->lazy_refcounts)
		return error_set(err, EOPNOTSUPP, "lazy refcounts are not supported: refcounts are always exact here");
	if (c->fixed)
		return error_set(err, EINVAL, "format qcow2 has no fixed images: preallocation is 'full'");
	if (c->version == 2 && ((bits && bits != 16) || c->extended_l2 || c->zstd))
		return error_set(err, EINVAL, "refcount_bits, extended_l2 and compression_type=zstd need version 3");
	if (c->extended_l2 && cluster < 16u << 10)
		return error_set(err, EINVAL, "extended_l2 needs clusters of 16K or more");
	if (!c->backing != !c->backing_format)
		return error_set(err, EINVAL, "a backing file goes with its format");
	if (c->backing && c->prealloc != PREALLOC_OFF)
		return error_set(err, EINVAL, "preallocated clusters would hide the backing file: only one of both");
	return 0;
}

static int lay_out(struct layout *l, const struct image_create *c, struct error *err)
{
	uint32_t cluster = c->cluster ? c->cluster : DEFAULT_CLUSTER;
	unsigned cb = (unsigned)__builtin_ctz(cluster), order = (unsigned)__builtin_ctz(c->refcount_bits ? c->refcount_bits : 16);
	unsigned span = cb + cb - (c->extended_l2 ? 4 : 3);
	uint64_t l1_size = (c->size >> span) + !!(c->size & ((1ull << span) - 1)), before = 0;
	bool v2 = c->version == 2;

	if (l1_size * 8 > QCOW2_L1_MAX)
		return error_set(err, EFBIG, "%llu bytes are too many for clusters of %u bytes: take larger ones",
			(unsigned long long)c->size, cluster);
	*l = (struct layout){ .l1 = (l1_size * 8 + cluster - 1) >> cb, .table = 1, .blocks = 1 };
	l->l1 = MAX(l->l1, 1u);
	do {
		before = l->total;
		l->total = 1 + l->table + l->blocks + l->l1;
		l->blocks = ((l->total - 1) >> (cb + 3 - order)) + 1;
		l->table = (l->blocks * 8 + cluster - 1) >> cb;
	} while (l->total != before);
	l->h = (struct qcow2_header){ .magic = QCOW2_MAGIC, .version = v2 ? 2 : 3, .cluster_bits = cb, .size = c->size,
		.l1_size = (uint32_t)l1_size, .l1_offset = (1 + l->table + l->blocks) << cb, .refcount_offset = cluster,
		.refcount_clusters = (uint32_t)l->table, .refcount_order = order,
		.header_length = v2 ? QCOW2_V2_LENGTH : QCOW2_HEAD,
		.incompatible = (c->extended_l2 ? QCOW2_EXT_L2 : 0) | (c->zstd ? QCOW2_COMPRESSION : 0),
		.compression_type = c->zstd };
	return 0;
}

/* ---- the first cluster ---- */

static size_t put_extension(uint8_t *head, size_t at, uint32_t type, const void *data, size_t len)
{
	uint32_t be[2] = { htobe32(type), htobe32((uint32_t)len) };

	memcpy(head + at, be, sizeof(be));
	memcpy(head + at + 8, data, len);
	return at + 8 + ((len + 7) & ~(size_t)7);
}

/* header, extensions, end mark, name */
static int fill_head(uint8_t *head, struct layout *l, const struct image_create *c, struct error *err)
{
	size_t at = l->h.header_length, name = c->backing ? strlen(c->backing) : 0;
	size_t format = c->backing_format ? strlen(c->backing_format) : 0;
	uint8_t own[QCOW2_HEAD];

	if (name > QCOW2_NAME_MAX || format > 63 || (name && at + 24 + format + 8 + name > 1ull << l->h.cluster_bits))
		return error_set(err, ENAMETOOLONG, "the name of the backing file is too long");
	if (name) {
		at = put_extension(head, at, QCOW2_EXT_BACKING_FORMAT, c->backing_format, format);
		at += 8;
		l->h.backing_offset = at;
		l->h.backing_length = (uint32_t)name;
		memcpy(head + at, c->backing, name);
	}
	qcow2_header_to_disk(&l->h, own);
	memcpy(head, own, qcow2_header_written(&l->h));
	return 0;
}

/* ---- the rest ---- */

static int write_table(const struct host_file *f, const struct layout *l)
{
	unsigned cb = l->h.cluster_bits;
	auto_free uint64_t *table = calloc(l->table, 1ull << cb);

	if (!table)
		return -ENOMEM;
	for (uint64_t k = 0; k < l->blocks; k++)
		table[k] = htobe64((1 + l->table + k) << cb);
	return meta_write(f, table, l->table << cb, l->h.refcount_offset);
}

static int write_blocks(const struct host_file *f, const struct layout *l)
{
	unsigned cb = l->h.cluster_bits, bits = cb + 3 - l->h.refcount_order;
	struct qcow2 q = { .h = l->h, .refs_max = l->h.refcount_order == 6 ? INT64_MAX
		: (1ull << (1u << l->h.refcount_order)) - 1 };
	auto_free uint8_t *block = malloc(1ull << cb);
	int r = block ? 0 : -ENOMEM;

	for (uint64_t k = 0; k < l->blocks && !r; k++) {
		uint64_t n = MIN(l->total - (k << bits), 1ull << bits);

		memset(block, 0, 1ull << cb);
		for (uint64_t at = 0; at < n; at++)
			qcow2_ref_store(&q, block, (unsigned)at, 1);
		r = meta_write(f, block, 1ull << cb, (1 + l->table + k) << cb);
	}
	return r;
}

static int fill_space(struct image *i, const struct alloc *a, enum image_prealloc prealloc)
{
	uint64_t pos = a->pos - (a->off - a->fill_off), len = a->fill_end - a->fill_off;

	if (prealloc == PREALLOC_FULL)
		return meta_fill(&i->file, pos, len);
	if (prealloc == PREALLOC_FALLOC && fallocate(i->file.meta_fd, 0, (off_t)pos, (off_t)len))
		return -errno;
	return a->blank ? 0 : meta_zero(&i->file, pos, len);
}

int qcow2_preallocate(struct image *i, uint64_t from, uint64_t to, enum image_prealloc prealloc, struct error *err)
{
	int r = 0;

	while (from < to && prealloc != PREALLOC_OFF) {
		struct extent e;
		struct alloc a = { 0 };
		uint64_t len = to - from;

		r = i->fmt->map(i, from, len, &e);
		if (!r && e.kind != EXT_HOLE) {
			from += MIN(e.len, len);
			continue;
		}
		r = r ? r : qcow2_alloc(i, from, MIN(len, e.len), &a);
		if (r)
			break;
		r = fill_space(i, &a, prealloc);
		if (r) {
			qcow2_drop(i, &a);
			break;
		}
		qcow2_link(i, &a);
		from += a.len;
	}
	return r ? error_errno(err, -r, "cannot reserve the space") : 0;
}

static void no_image(struct image *i)
{
	if (i->priv)
		i->fmt->close(i);
	plan_clear(&i->plan);
	free(i->backing_name);
	free(i->backing_format);
}

/* All clusters are given to the guest before there is one. On return h is as it is on disk. */
static int preallocate(struct host_file *f, const uint8_t *head, struct layout *l, enum image_prealloc prealloc,
	struct error *err)
{
	struct image_how how = { 0 };
	struct image i = { .fmt = &qcow2_format, .path = "", .file = *f, .blocking = true };
	int r = qcow2_attach(&i, &how, head, 1ull << l->h.cluster_bits, err);

	if (!r) {
		/* Its header has no magic as long as it is not ready. */
		qcow2_of(&i)->h.magic = 0;
		r = qcow2_preallocate(&i, 0, l->h.size, prealloc, err);
	}
	if (!r) {
		r = image_flush(&i);
		if (r)
			error_errno(err, -r, "its metadata cannot be written");
	}
	if (!r)
		l->h = qcow2_of(&i)->h;
	no_image(&i);
	f->size = i.file.size;
	return r;
}

static int write_all(struct host_file *f, uint8_t *head, struct layout *l, const struct image_create *c, struct error *err)
{
	uint32_t cluster = 1u << l->h.cluster_bits, magic = htobe32(QCOW2_MAGIC);
	int r;

	if (f->blockdev && f->size < l->total << l->h.cluster_bits)
		return error_set(err, ENOSPC, "the block device has only %llu bytes", (unsigned long long)f->size);
	/* The whole header but its magic. */
	r = meta_write(f, head + 4, cluster - 4, 4);
	if (!r && f->blockdev)
		r = meta_fill(f, 0, 4);
	r = r ? r : write_table(f, l);
	r = r ? r : write_blocks(f, l);
	if (!r && f->blockdev)
		r = meta_zero(f, l->h.l1_offset, l->l1 << l->h.cluster_bits);
	else if (!r && ftruncate(f->meta_fd, (off_t)(l->total << l->h.cluster_bits)))
		r = -errno;
	if (r)
		return error_errno(err, -r, "its metadata cannot be written");
	if (!f->blockdev)
		f->size = l->total << l->h.cluster_bits;
	if (c->prealloc != PREALLOC_OFF && l->h.size) {
		r = preallocate(f, head, l, c->prealloc, err);
		if (r)
			return r;
	}
	r = meta_sync(f);
	r = r ? r : meta_write(f, &magic, 4, 0);
	r = r ? r : meta_sync(f);
	return r ? error_errno(err, -r, "its header cannot be written") : 0;
}

int qcow2_create(struct host_file *f, const struct image_create *c, struct error *err)
{
	auto_free uint8_t *head = NULL;
	struct layout l;
	int r = check_options(c, err);

	r = r ? r : lay_out(&l, c, err);
	if (r)
		return r;
	head = calloc(1, 1ull << l.h.cluster_bits);
	if (!head)
		return error_set(err, ENOMEM, "out of memory");
	r = fill_head(head, &l, c, err);
	return r ? r : write_all(f, head, &l, c, err);
}
