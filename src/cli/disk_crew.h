#ifndef CLI_DISK_CREW_H
#define CLI_DISK_CREW_H
/*
 * Threads that fetch what an image's map points to. The main thread alone uses the image: it fills jobs with
 * pieces, hands them over, and takes them back in order or as they come.
 */
#include <stdbool.h>
#include <stdint.h>
#include "vmm/image.h"

#define CREW_PIECES 32

enum crew_state { CREW_IDLE, CREW_QUEUED, CREW_RUNNING, CREW_DONE };
struct crew_job {
	/* main thread, before crew_submit() */
	uint64_t off, len;              /* where it goes; bytes */
	struct image_piece piece[CREW_PIECES];
	unsigned nr;
	bool filled;                    /* buf has the bytes already */
	/* the thread that works on it, until it is done */
	uint8_t *buf;                   /* room as crew_new() was told */
	bool *zero;                     /* by unit: nothing but zeroes */
	uint8_t *z;                     /* by cluster of crew_how.packs: its bytes compressed */
	size_t *z_len;                  /* of each: 0: not compressed */
	int r;
	/* crew.c, under its lock */
	enum crew_state state;
	uint64_t number;
};

struct crew_how {
	unsigned threads;               /* the main thread is one of them: it works instead of waiting */
	size_t room;                    /* bytes of a job at most */
	size_t unit;                    /* bytes that are zero as one; 0: do not look */
	const struct image *packs;      /* compress for this image, what is not zero; NULL: do not. Clusters divide room */
	int raw_fd;                     /* >= 0: write what is not zero there, at off */
};
struct crew;

/* NULL with errno: no memory, no threads. */
struct crew *crew_new(const struct crew_how *how);
void crew_free(struct crew *c);                         /* waits for the running ones; NULL is fine */
struct crew_job *crew_idle(struct crew *c);             /* one to fill, NULL: take back a done one first */
void crew_submit(struct crew *c, struct crew_job *j);
/* The one submitted first, or any, when it is done; work on others meanwhile. NULL: none is out. */
struct crew_job *crew_done(struct crew *c, bool any);
/* All units of [at, end) of the job are zero. */
bool crew_zero(const struct crew_how *how, const struct crew_job *j, uint64_t at, uint64_t end);
void crew_release(struct crew *c, struct crew_job *j);  /* it is idle again */
#endif
