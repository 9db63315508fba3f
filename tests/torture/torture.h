#ifndef TORTURE_H
#define TORTURE_H
/* Disk images under stress: what the modes share. One thread. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include "vmm/error.h"
#include "vmm/image.h"

#define SECTOR    512u
#define DISK_MAX  (4u << 20)            /* bytes of the disks that are tortured */
#define SNAPSHOTS 4

/* An image and the plain model of what it must contain. */
struct world {
	char dir[64], path[128], base[128];     /* base: a backing image, "" where there is none */
	struct image_create make;
	const char *format;
	uint64_t size;
	uint8_t *data;                  /* DISK_MAX bytes */
	struct {
		bool there;
		char name[16];
		uint64_t size;
		uint8_t *data;
	} snapshot[SNAPSHOTS];
	uint64_t seed;
	bool unsure;                    /* an operation failed: data is not all that may be there */
	unsigned ops;                   /* done so far; each write's bytes tell which it was */
};

/* Says what is wrong, keeps the files, ends the program with status 1. */
__attribute__((format(printf, 2, 3), noreturn))
void broken(const struct world *w, const char *fmt, ...);

unsigned rnd(struct world *w, unsigned n);
/* A directory, perhaps a backing image, options of the format by chance. Not made yet. */
void world_new(struct world *w, const char *format, uint64_t seed);
void world_make(struct world *w);
void world_free(struct world *w);       /* removes the files */
struct image *world_open(struct world *w, bool readonly);
int  world_try_open(struct world *w, bool readonly, struct image **ret, struct error *err);

/* One random operation on image and model. */
enum op_kind { DO_WRITE, DO_ZERO, DO_DISCARD, DO_FLUSH, DO_SNAPSHOT, DO_RESIZE };
struct op_done {
	enum op_kind kind;
	uint64_t off, len;
	int err;
};
struct op_done world_op(struct world *w, struct image *i, bool structure);     /* structure: snapshots and sizes too */

void world_compare(struct world *w, struct image *i);
/* Corruptions are always wrong; leaks where exact. With qemu: its check and contents too, where it knows the format. */
void world_check(struct world *w, bool exact);
void world_repair(struct world *w);
void world_compare_qemu(struct world *w);
bool have_qemu(void);
int  run_quietly(const char *const *argv);      /* its exit status; -1: a signal */

/* modes: argv after the mode's name; the number of runs that were made */
int mode_differential(const char *format, uint64_t from, uint64_t to, unsigned qemu_every);
int mode_kill(const char *format, uint64_t from, uint64_t to);
int mode_powercut(const char *format, uint64_t from, uint64_t to);
int mode_faults(const char *format, uint64_t from, uint64_t to, unsigned step);
#endif
