/*
 * Each call that reads or writes the file fails once, in a run of its own. Whatever the operation then answers, the image
 * has no corruption afterwards, and what later operations wrote is there.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "record.h"
#include "torture.h"

#define OPS 2000

static void run(struct world *w, unsigned at, int err)
{
	static uint8_t sure[DISK_MAX / SECTOR];         /* 1: what the model says; 0: perhaps not */
	static uint8_t since[DISK_MAX / SECTOR];        /* 1: changed since the last flush */
	struct image *i;
	struct error why;
	unsigned failed = 0;

	world_make(w);
	memset(sure, 1, sizeof(sure));
	memset(since, 0, sizeof(since));
	fail_with = err;
	fail_at = 0;
	if (world_try_open(w, false, &i, &why))
		broken(w, "open: %s", why.msg);
	calls_made = 0;
	fail_at = at;
	for (unsigned k = 0; k < OPS; k++) {
		struct op_done d = world_op(w, i, false);

		failed += d.err != 0;
		if (d.kind != DO_FLUSH) {
			memset(sure + d.off / SECTOR, d.err == 0, d.len / SECTOR);
			memset(since + d.off / SECTOR, 1, d.len / SECTOR);
		} else if (!d.err) {
			memset(since, 0, sizeof(since));
		}
	}
	if (image_close(i)) {
		if (calls_made < fail_at)
			broken(w, "close failed and nothing else did");
		for (unsigned k = 0; k < DISK_MAX / SECTOR; k++)        /* it said so */
			sure[k] &= !since[k];
	}
	fail_at = 0;
	if (failed > 1)
		broken(w, "one call failed (number %u), %u operations did", at, failed);
	world_check(w, false);
	i = world_open(w, true);
	for (uint64_t k = 0; k < w->size / SECTOR; k++) {
		uint8_t is[SECTOR];

		if (image_read(i, is, SECTOR, k * SECTOR))
			broken(w, "sector %llu cannot be read", (unsigned long long)k);
		if (sure[k] && memcmp(is, w->data + k * SECTOR, SECTOR))
			broken(w, "sector %llu is lost after call %u failed with %s", (unsigned long long)k, at,
				strerrordesc_np(-err));
	}
	image_close(i);
}

int mode_faults(const char *format, uint64_t from, uint64_t to, unsigned step)
{
	int runs = 0;

	for (uint64_t seed = from; seed < to; seed++) {
		unsigned calls = 1;

		for (unsigned at = 1; at <= calls; at += step ? step : 1) {
			struct world w;

			world_new(&w, format, seed);
			make_trouble = at % 3 == 0;
			run(&w, at, at % 2 ? -EIO : -ENOSPC);
			calls = calls_made;
			world_free(&w);
			runs++;
		}
	}
	make_trouble = false;
	return runs;
}
