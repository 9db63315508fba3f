/* The configuration space of virtio-blk (virtio 1.2, 5.2.4), as the keys of --disk shape it. */
#include "blk_config.h"
#include <endian.h>
#include <errno.h>
#include <string.h>
#include "vmm/block.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/opts.h"
#include "vmm/virtq.h"
#include "vmm/vm.h"

#define QUEUES_MAX    16
#define QUEUE_SIZE    256
#define LOGICAL_MAX   4096u
#define PHYSICAL_MAX  (64u << 10)
#define DISCARD_BYTES (1ull << 30)
#define ZERO_BYTES    (64ull << 20)     /* a host that must write them is busy for a while */

/* The field counts 32 bits of sectors; whole blocks of any size. */
#define RANGE_MAX     ((uint64_t)UINT32_MAX * BLK_SECTOR / LOGICAL_MAX * LOGICAL_MAX)

/* ---- keys; main thread ---- */

static bool power_of_two(uint64_t v)
{
	return v && !(v & (v - 1));
}

static int read_power(struct opts *o, const char *key, uint64_t min, uint64_t max, uint64_t *val,
	struct error *err)
{
	int r = opts_size(o, key, min, max, val, err);

	if (!r && !power_of_two(*val))
		r = error_set(err, EINVAL, "%s: %s=%llu: must be a power of two", opts_option(o), key,
			(unsigned long long)*val);
	return r;
}

/* A size in whole blocks of unit bytes; an absent key leaves *val alone. */
static int read_blocks(struct opts *o, const char *key, uint32_t unit, uint64_t min, uint64_t max,
	uint64_t *val, struct error *err)
{
	int r = opts_size(o, key, min, max, val, err);

	if (!r && *val % unit)
		r = error_set(err, EINVAL, "%s: %s=%llu: must be a multiple of %u", opts_option(o), key,
			(unsigned long long)*val, unit);
	return r;
}

static int read_block_sizes(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err)
{
	uint64_t logical = BLK_SECTOR, physical, align = 0;
	int r = read_power(o, "logical", BLK_SECTOR, LOGICAL_MAX, &logical, err);

	if (r)
		return r;
	physical = MAX(logical, disk_block_size(d));
	r = read_power(o, "physical", logical, PHYSICAL_MAX, &physical, err);
	/* The field has 8 bits. */
	if (!r)
		r = read_blocks(o, "align_offset", (uint32_t)logical, 0, MIN(physical - logical, UINT8_MAX * logical),
			&align, err);
	if (r)
		return r;
	if (disk_size(d) % logical)
		return error_set(err, EINVAL, "%s: logical=%llu: the disk's %llu bytes are not whole blocks of that",
			opts_option(o), (unsigned long long)logical, (unsigned long long)disk_size(d));
	s->logical = (uint32_t)logical;
	s->physical = (uint32_t)physical;
	s->align_offset = (uint32_t)align;
	s->min_io = physical;
	r = read_blocks(o, "min_io", s->logical, 0, (uint64_t)UINT16_MAX * logical, &s->min_io, err);
	return r ? r : read_blocks(o, "opt_io", s->logical, 0, (uint64_t)UINT32_MAX * logical, &s->opt_io, err);
}

/* virtio 1.2, 2.7.5.3.1: no chain is longer than its queue, so neither is what seg_max promises. */
static int read_queues(struct blk_shape *s, struct opts *o, struct error *err)
{
	uint64_t queues = 1, size = QUEUE_SIZE, seg = 0, bytes = 0, thread = 0, poll = UINT64_MAX;
	int r;

	if ((r = opts_u64(o, "queues", 1, QUEUES_MAX, &queues, err)) ||
		(r = read_power(o, "queue_size", 2, VIRTQ_MAX, &size, err)) ||
		(r = opts_u64(o, "iothread", 0, VM_IOTHREADS, &thread, err)) ||
		(r = opts_u64(o, "poll_us", 0, 1000000, &poll, err)))
		return r;
	seg = size > 3 ? MIN(size - 2, BLK_IOVS) : 1;
	if ((r = opts_u64(o, "seg_max", 1, seg, &seg, err)) ||
		(r = read_blocks(o, "size_max", s->logical, s->logical, UINT32_MAX, &bytes, err)))
		return r;
	s->queues = (uint16_t)queues;
	s->queue_size = (uint16_t)size;
	s->iothread = (unsigned)thread;
	s->poll_us = poll == UINT64_MAX ? -1 : (int64_t)poll;
	s->seg_max = (uint32_t)seg;
	s->size_max = (uint32_t)bytes;
	return 0;
}

static int refuse_keys(struct opts *o, const char *const *keys, const char *why, struct error *err)
{
	for (; *keys; keys++)
		if (opts_str(o, *keys))
			return error_set(err, EINVAL, "%s: %s: %s", opts_option(o), *keys, why);
	return 0;
}

static int read_discard(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err)
{
	static const char *const keys[] = { "discard_max", "discard_seg", "discard_align", NULL };
	uint64_t max = DISCARD_BYTES, seg = 1, align = MAX(s->logical, disk_block_size(d));
	int r;

	if (!disk_can_discard(d))
		return refuse_keys(o, keys, "this disk has no discard (read-only, or discard=off)", err);
	if ((r = read_blocks(o, "discard_max", s->logical, s->logical, RANGE_MAX, &max, err)) ||
		(r = opts_u64(o, "discard_seg", 1, BLK_IOVS, &seg, err)) ||
		(r = read_blocks(o, "discard_align", s->logical, s->logical, RANGE_MAX, &align, err)))
		return r;
	s->discard_max = max;
	s->discard_seg = (uint32_t)seg;
	s->discard_align = align;
	return 0;
}

static int read_zeroes(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err)
{
	static const char *const keys[] = { "zeroes_max", "zeroes_seg", NULL };
	uint64_t max = ZERO_BYTES, seg = 1;
	int r;

	if (disk_readonly(d))
		return refuse_keys(o, keys, "this disk is read-only", err);
	if ((r = read_blocks(o, "zeroes_max", s->logical, s->logical, RANGE_MAX, &max, err)) ||
		(r = opts_u64(o, "zeroes_seg", 1, BLK_IOVS, &seg, err)))
		return r;
	s->zeroes_max = max;
	s->zeroes_seg = (uint32_t)seg;
	return 0;
}

static int read_resize(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err)
{
	static const char *const choices[] = { "off", "auto", NULL };
	int resize = 0, r = opts_choice(o, "resize", choices, &resize, err);

	if (!r && resize && !disk_can_grow(d))
		r = error_set(err, EINVAL, "%s: resize=auto: only a raw image grows with its host file",
			opts_option(o));
	s->resize = resize;
	return r;
}

static int read_serial(struct blk_shape *s, struct opts *o, struct error *err)
{
	const char *serial = opts_str(o, "serial");

	if (serial && strlen(serial) > sizeof(s->serial))
		return error_set(err, EINVAL, "%s: serial=%s: at most %zu characters", opts_option(o), serial,
			sizeof(s->serial));
	if (serial)
		memcpy(s->serial, serial, strlen(serial));
	return 0;
}

int blk_shape_read(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err)
{
	int r;

	*s = (struct blk_shape){ 0 };
	if ((r = read_block_sizes(s, d, o, err)) || (r = read_queues(s, o, err)) ||
		(r = read_discard(s, d, o, err)) || (r = read_zeroes(s, d, o, err)) ||
		(r = read_resize(s, d, o, err)) || (r = read_serial(s, o, err)))
		return r;
	return opts_end(o, err);
}

/* ---- what the driver sees ---- */

uint64_t blk_shape_features(const struct blk_shape *s, const struct disk *d)
{
	uint64_t f = 1ull << VIRTIO_BLK_F_SEG_MAX | 1ull << VIRTIO_BLK_F_BLK_SIZE |
		1ull << VIRTIO_BLK_F_TOPOLOGY | 1ull << VIRTIO_BLK_F_FLUSH |
		1ull << VIRTIO_BLK_F_CONFIG_WCE;

	f |= 1ull << (disk_readonly(d) ? VIRTIO_BLK_F_RO : VIRTIO_BLK_F_WRITE_ZEROES);
	if (disk_can_discard(d))
		f |= 1ull << VIRTIO_BLK_F_DISCARD;
	if (s->size_max)
		f |= 1ull << VIRTIO_BLK_F_SIZE_MAX;
	if (s->queues > 1)
		f |= 1ull << VIRTIO_BLK_F_MQ;
	return f;
}

uint64_t blk_shape_capacity(const struct blk_shape *s, const struct disk *d)
{
	uint64_t size = disk_size(d);

	return (size - size % s->logical) / BLK_SECTOR;
}

void blk_shape_config(const struct blk_shape *s, const struct disk *d, struct virtio_blk_config *c)
{
	*c = (struct virtio_blk_config){
		.capacity = htole64(blk_shape_capacity(s, d)),
		.size_max = htole32(s->size_max),
		.seg_max = htole32(s->seg_max),
		.blk_size = htole32(s->logical),
		.physical_block_exp = (uint8_t)__builtin_ctz(s->physical / s->logical),
		.alignment_offset = (uint8_t)(s->align_offset / s->logical),
		.min_io_size = htole16((uint16_t)(s->min_io / s->logical)),
		.opt_io_size = htole32((uint32_t)(s->opt_io / s->logical)),
		.wce = disk_has_writeback(d),
		.num_queues = htole16(s->queues),
		.max_discard_sectors = htole32((uint32_t)(s->discard_max / BLK_SECTOR)),
		.max_discard_seg = htole32(s->discard_seg),
		.discard_sector_alignment = htole32((uint32_t)(s->discard_align / BLK_SECTOR)),
		.max_write_zeroes_sectors = htole32((uint32_t)(s->zeroes_max / BLK_SECTOR)),
		.max_write_zeroes_seg = htole32(s->zeroes_seg),
		.write_zeroes_may_unmap = disk_can_discard(d),
	};
}
