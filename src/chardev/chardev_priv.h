#ifndef CHARDEV_PRIV_H
#define CHARDEV_PRIV_H
/*
 * A chardev is one user's handle; a stream is the host end. Each has its own stream, but for "stdio",
 * which all of its users share: output is merged, input goes to the user that has the focus.
 */
#include <pthread.h>
#include <stdatomic.h>
#include "vmm/chardev.h"
#include "vmm/loop.h"
struct error;

#define RING_FIRST 4096u
#define RING_MAX   (1u << 20)           /* bytes kept for a reader that stalls */
#define TX_SIZE    8192
#define RX_SIZE    1024

struct stream;

struct chardev {
	/* const after open */
	struct stream *s;
	char name[32];
	_Atomic(struct chardev *) next; /* users of the same stream: added by main, removed by the loop */
	void (*tap)(void *arg, const uint8_t *buf, size_t len);
	void *tap_arg;

	/* main thread */
	struct chardev *next_open;

	/* any thread */
	_Atomic(struct chardev_user *) user;
	_Atomic uint64_t bytes_in, bytes_out;

	/* home loop only */
	bool told_connected;
	uint8_t fifo[RX_SIZE];          /* read, not yet taken by the user */
	size_t fifo_pos, fifo_len;
};

struct stream {
	/* const after open */
	struct loop *home;
	char name[32];                  /* its first user's, for messages */
	bool discard;                   /* "null" */
	bool shared;                    /* "stdio" */
	int listen_fd;                  /* "unix:", else -1 */
	bool foreground;                /* "stdio": the terminal, if it is one, is ours to read */
	unsigned refs;                  /* main thread */

	/* any thread */
	_Atomic(struct chardev *) focus;
	_Atomic(struct chardev *) users;
	_Atomic bool terminal;          /* raw: read always, Ctrl-A is ours */
	_Atomic bool hold_input;        /* a terminal that chardev_stdio_start() has not claimed */
	struct loop_task pump;

	/* any thread, under lock: a leaf */
	pthread_mutex_t lock;           /* guards what follows */
	pthread_cond_t moved;           /* settled grew, or ready or dead changed */
	uint8_t *ring;
	size_t ring_size, ring_start, ring_len;
	uint64_t accepted, settled, dropped;    /* bytes so far; settled: with the host, or dropped */
	bool dead;                      /* the host end is gone for good: output is dropped */
	bool ready;                     /* there is somebody to write to */

	/* home loop only, but const while there is no listen_fd */
	int in_fd, out_fd;
	bool own_fds;
	bool rd_idle, wr_idle, rd_dead, closing, gone, listening, full_told;
	struct loop_op rd, wr;
	struct iovec rd_iov, wr_iov;
	struct loop_fd listener;
	bool escape;                    /* the last key was Ctrl-A */
	size_t tx_pos, tx_len;
	uint8_t tx[TX_SIZE], rx[RX_SIZE];
};

/* stream.c */
struct stream *stream_new(struct loop *home);   /* main thread; no descriptors yet; NULL: no memory */
void stream_free(struct stream *s);             /* main thread; no users are left */
void stream_write(struct stream *s, const void *buf, size_t len);       /* any thread */
void stream_input(struct chardev *c, const uint8_t *buf, size_t len);   /* home loop: to its user, in time */

/* open.c: fill in the descriptors that spec names. Main thread; 0 or -errno with words. */
int stream_open(struct stream *s, const char *spec, const char *name, struct error *err);

/* stdio.c: what the keyboard sent; home loop. */
void terminal_keys(struct stream *s, const uint8_t *buf, size_t len);
void terminal_set_stream(struct stream *s);     /* the one stream of stdio, or NULL; main thread */
struct stream *terminal_stream(void);           /* main thread */
#endif
