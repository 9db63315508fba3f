/*
 * A child writes through the loop, many requests at once, and is killed at a random instant. What is left must have no
 * corruption, all that was flushed, and nothing that was never written.
 *
 * Each sector carries a generation. The table of generations lies in memory shared with the child: `begun` is set before
 * a write is submitted, `flushed` when a flush that was submitted after its end is through.
 */
#include <errno.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "torture.h"
#include "vmm/block.h"
#include "vmm/cleanup.h"
#include "vmm/opts.h"

#define SECTORS (DISK_MAX / SECTOR)
#define DEPTH   8
#define MOST    256             /* sectors of a write */

struct generations {
	uint32_t begun[SECTORS], written[SECTORS], flushed[SECTORS];
};

struct slot {
	struct blk_req r;
	struct iovec iov;
	bool busy;
	uint32_t snapshot[SECTORS];     /* a flush: what was written when it was submitted */
	uint8_t data[MOST * SECTOR];
};

static struct world *world;
static struct generations *gen;
static struct disk *disk;
static struct slot *slots;
static uint32_t generation;

static void start(struct slot *s);

static void done(struct blk_req *r, int err)
{
	struct slot *s = container_of(r, struct slot, r);
	uint64_t first = r->off / SECTOR, n = r->len / SECTOR;

	if (err)
		_exit(3);
	for (uint64_t k = first; k < first + n && r->op != BLK_FLUSH; k++)
		gen->written[k] = gen->begun[k];
	if (r->op == BLK_FLUSH)
		memcpy(gen->flushed, s->snapshot, sizeof(gen->flushed));
	s->busy = false;
	start(s);
}

static bool overlaps(uint64_t off, uint64_t len)
{
	for (unsigned k = 0; k < DEPTH; k++)
		if (slots[k].busy && slots[k].r.op != BLK_FLUSH && off < slots[k].r.off + slots[k].r.len &&
			slots[k].r.off < off + len)
			return true;
	return false;
}

/* One flush at a time, or an older one could overwrite what a newer said. */
static bool flushing(void)
{
	for (unsigned k = 0; k < DEPTH; k++)
		if (slots[k].busy && slots[k].r.op == BLK_FLUSH)
			return true;
	return false;
}

static void start(struct slot *s)
{
	uint64_t sectors = world->size / SECTOR, off, n;
	bool flush = rnd(world, 12) == 0 && !flushing();

	do {
		off = rnd(world, (unsigned)sectors);
		n = 1 + rnd(world, rnd(world, 6) ? 32 : MOST);
		n = MIN(n, sectors - off);
	} while (overlaps(off * SECTOR, n * SECTOR));
	s->r = (struct blk_req){ .op = flush ? BLK_FLUSH : BLK_WRITE, .off = off * SECTOR, .len = flush ? 0 : n * SECTOR,
		.iov = &s->iov, .cnt = 1, .done = done };
	s->iov = (struct iovec){ s->data, n * SECTOR };
	s->busy = true;
	if (flush) {
		memcpy(s->snapshot, gen->written, sizeof(s->snapshot));
	} else {
		generation++;
		for (uint64_t k = off; k < off + n; k++) {
			gen->begun[k] = generation;
			for (unsigned b = 0; b < SECTOR; b += 8)
				*(uint64_t *)(s->data + (k - off) * SECTOR + b) = (uint64_t)generation << 32 | k;
		}
	}
	disk_submit(disk, &s->r);
}

static void start_all(void *arg)
{
	(void)arg;
	for (unsigned k = 0; k < DEPTH; k++)
		start(&slots[k]);
}

/* Never returns. ready: the first request is about to be made. */
__attribute__((noreturn))
static void child(sem_t *ready)
{
	struct loop *loop;
	struct opts *o;
	struct error err;
	char text[200];

	snprintf(text, sizeof(text), "%s,format=%s%s", world->path, world->format, *world->base ? ",backing=allow" : "");
	if (opts_parse(&o, "--disk", text, "file", &err) || disk_open(&disk, o, &err))
		_exit(2);
	loop = loop_new("io/0", LOOP_AUTO, 0, &err);
	if (!loop)
		_exit(2);
	disk_set_home(disk, loop);
	slots = calloc(DEPTH, sizeof(*slots));
	sem_post(ready);
	loop_call(loop, start_all, NULL);
	for (;;)
		pause();
}

static void verify(struct world *w, uint32_t *sure)
{
	struct image *i = world_open(w, true);

	for (uint64_t k = 0; k < w->size / SECTOR; k++) {
		uint64_t is[SECTOR / 8];
		uint32_t g;

		if (image_read(i, is, SECTOR, k * SECTOR))
			broken(w, "sector %llu cannot be read after a kill", (unsigned long long)k);
		sure[k] = 0;
		if (!memcmp(is, w->data + k * SECTOR, SECTOR)) {        /* as it was made */
			if (gen->flushed[k])
				broken(w, "sector %llu is lost, flushed was %u", (unsigned long long)k, gen->flushed[k]);
			continue;
		}
		for (unsigned b = 1; b < SECTOR / 8; b++)
			if (is[b] != is[0])
				broken(w, "sector %llu is torn", (unsigned long long)k);
		g = (uint32_t)(is[0] >> 32);
		if ((uint32_t)is[0] != k)
			broken(w, "sector %llu holds sector %u", (unsigned long long)k, (uint32_t)is[0]);
		if (g < gen->flushed[k] || g > gen->begun[k])
			broken(w, "sector %llu has generation %u, flushed was %u, begun %u", (unsigned long long)k, g,
				gen->flushed[k], gen->begun[k]);
		sure[k] = g;
	}
	image_close(i);
}

/* The kernel ends a killed process's ring, and with it its hold on the file, a moment after the process. */
static void wait_for_lock(struct world *w)
{
	struct image *i;
	struct error err;
	int r;

	for (int tries = 0; tries < 500; tries++) {
		r = world_try_open(w, true, &i, &err);
		if (!r)
			image_close(i);
		if (r != -EBUSY)
			return;
		usleep(10000);
	}
}

static void one_kill(struct world *w, sem_t *ready)
{
	static uint32_t sure[SECTORS];
	pid_t pid = fork();
	int status;

	if (!pid)
		child(ready);
	while (sem_wait(ready) && errno == EINTR)
		;
	usleep(rnd(w, rnd(w, 3) ? 3000 : 30000));
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	if (!WIFSIGNALED(status))
		broken(w, "the writer ended by itself: %d", WEXITSTATUS(status));
	wait_for_lock(w);
	world_check(w, false);
	verify(w, sure);
	if (rnd(w, 4) == 0) {
		world_repair(w);
		verify(w, sure);
	}
	/* What is there now is there for good. */
	for (unsigned k = 0; k < SECTORS; k++)
		gen->begun[k] = gen->written[k] = gen->flushed[k] = gen->begun[k] ? sure[k] : 0;
	for (unsigned k = 0; k < SECTORS; k++)
		generation = MAX(generation, gen->begun[k]);
}

int mode_kill(const char *format, uint64_t from, uint64_t to)
{
	size_t bytes = sizeof(*gen) + sizeof(sem_t);
	struct world w;
	sem_t *ready;
	bool made = false;

	gen = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ready = (sem_t *)(gen + 1);
	for (uint64_t seed = from; seed < to; seed++) {
		if (!made || seed % 10 == 0) {
			if (made)
				world_free(&w);
			memset(gen, 0, bytes);
			sem_init(ready, 1, 0);
			generation = 0;
			world_new(&w, format, seed);
			world = &w;
			world_make(&w);
			made = true;
		}
		one_kill(&w, ready);
		w.seed = (w.seed + seed) | 1;
	}
	if (made)
		world_free(&w);
	return (int)(to - from);
}
