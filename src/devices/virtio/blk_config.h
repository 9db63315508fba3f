#ifndef BLK_CONFIG_H
#define BLK_CONFIG_H
/* What a virtio-blk device tells its driver about the disk, and the keys of --disk that decide it. */
#include <linux/virtio_blk.h>
#include <stdbool.h>
#include <stdint.h>
struct disk;
struct error;
struct opts;

#define BLK_SECTOR 512u         /* unit of virtio-blk, whatever the block size (virtio 1.2, 5.2.4) */

/* Sizes are in bytes and checked: whole logical blocks that the configuration's fields can hold. */
struct blk_shape {
	uint32_t logical, physical;     /* block sizes: powers of two */
	uint32_t align_offset;          /* of the first whole physical block */
	uint64_t min_io, opt_io;        /* hints; opt_io 0: none */
	uint32_t seg_max;               /* data segments of one request */
	uint32_t size_max;              /* of one segment; 0: no limit, and no VIRTIO_BLK_F_SIZE_MAX */
	uint64_t discard_max, zeroes_max;       /* of one segment */
	uint32_t discard_seg, zeroes_seg;       /* segments of one request, up to BLK_IOVS */
	uint64_t discard_align;         /* hint */
	uint16_t queues, queue_size;
	unsigned iothread;              /* vm_iothread() */
	int64_t poll_us;                /* -1: not said */
	bool resize;                    /* follow the host file as it grows */
	char serial[VIRTIO_BLK_ID_BYTES];       /* not terminated where it is full */
};

/* Main thread, while the VM is built. Asks for its keys, and that there are no others: 0 or -EINVAL with words. */
int blk_shape_read(struct blk_shape *s, const struct disk *d, struct opts *o, struct error *err);
uint64_t blk_shape_features(const struct blk_shape *s, const struct disk *d);
void blk_shape_config(const struct blk_shape *s, const struct disk *d, struct virtio_blk_config *c);

/* The disk's size in sectors, whole logical blocks only. Main thread while the VM is built, then home loop. */
uint64_t blk_shape_capacity(const struct blk_shape *s, const struct disk *d);
#endif
