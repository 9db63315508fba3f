/* Random operations on an image and on plain bytes; and the same by qemu-io, read by us. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "torture.h"

#define OPS 60

static void ours(struct world *w, bool qemu)
{
	unsigned n = 1 + rnd(w, OPS * 2);
	struct image *i;

	world_make(w);
	i = world_open(w, false);
	while (n--) {
		struct op_done d = world_op(w, i, true);

		if (d.err && d.kind != DO_SNAPSHOT && d.kind != DO_RESIZE)
			broken(w, "operation %u (kind %d at %llu+%llu) failed: %s", w->ops, d.kind,
				(unsigned long long)d.off, (unsigned long long)d.len, strerrordesc_np(-d.err));
		if (rnd(w, 20) == 0) {          /* as somebody else finds it */
			if (image_close(i))
				broken(w, "close");
			world_check(w, true);
			i = world_open(w, false);
		}
	}
	world_compare(w, i);
	if (image_close(i))
		broken(w, "close");
	i = world_open(w, true);
	world_compare(w, i);
	image_close(i);
	world_check(w, true);
	if (qemu)
		world_compare_qemu(w);
}

static void theirs(struct world *w)
{
	const char *argv[160] = { "qemu-io", "-f", w->format };
	char *text[64];
	unsigned n = 1 + rnd(w, 60), at = 3;
	struct image *i;

	world_make(w);
	for (unsigned k = 0; k < n; k++) {
		uint64_t off = SECTOR * (uint64_t)rnd(w, (unsigned)(w->size / SECTOR));
		uint64_t len = SECTOR * (uint64_t)(1 + rnd(w, 200));
		unsigned byte = 1 + rnd(w, 255);
		bool zero = rnd(w, 4) == 0;

		if (len > w->size - off)
			len = w->size - off;
		memset(w->data + off, zero ? 0 : (int)byte, len);
		if ((zero ? asprintf(&text[k], "write -z %s %llu %llu", rnd(w, 2) ? "-u" : "", (unsigned long long)off,
				(unsigned long long)len)
			  : asprintf(&text[k], "write -P 0x%02x %llu %llu", byte, (unsigned long long)off,
				(unsigned long long)len)) < 0)
			broken(w, "no memory");
		argv[at++] = "-c";
		argv[at++] = text[k];
	}
	argv[at++] = w->path;
	argv[at] = NULL;
	if (run_quietly(argv))
		broken(w, "qemu-io");
	for (unsigned k = 0; k < n; k++)
		free(text[k]);
	i = world_open(w, true);
	world_compare(w, i);
	image_close(i);
	world_check(w, true);
}

int mode_differential(const char *format, uint64_t from, uint64_t to, unsigned qemu_every)
{
	int runs = 0;

	for (uint64_t seed = from; seed < to; seed++) {
		bool qemu = qemu_every && seed % qemu_every == 0 && have_qemu();
		struct world w;

		world_new(&w, format, seed);
		ours(&w, qemu);
		world_free(&w);
		runs++;
		if (!qemu || !strcmp(format, "vdi"))    /* qemu-io leaks there by itself */
			continue;
		world_new(&w, format, seed + 1000000);
		theirs(&w);
		world_free(&w);
		runs++;
	}
	return runs;
}
