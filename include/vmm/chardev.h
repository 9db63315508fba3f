#ifndef VMM_CHARDEV_H
#define VMM_CHARDEV_H
/*
 * The host end of a byte stream: what a serial port or a console port is connected to. Output goes into
 * a ring of at most 1 MiB and from there to the host by the loop; when the reader stalls the oldest
 * bytes are dropped and counted, the guest never waits. EPIPE and a closed stdout are silent.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct chardev;
struct error;
struct facts;
struct loop;

/*
 * spec: "stdio" | "null" | "file:PATH" (created, truncated) | "append:PATH" | "pipe:PATH" (an existing
 * FIFO for output, or PATH.in and PATH.out as QEMU has it) | "unix:PATH" (listens, one client at a time,
 * 0600; what was written before a client came waits for it; the file stays, and a later run replaces it) | "fd:N" (in the directions it is open for).
 * Everything is opened here. Several users of "stdio" share it: output is merged, Ctrl-A c moves the keyboard.
 * Inherited descriptors keep their flags. home outlives the chardev. Main thread.
 */
int  chardev_open(struct chardev **ret, const char *spec, const char *name, struct loop *home,
	struct error *err);
void chardev_free(struct chardev *c);   /* main thread; drops the reference; NULL is fine */

/* Bytes toward the host. Any thread, never blocks. */
void chardev_write(struct chardev *c, const void *buf, size_t len);

/*
 * Bytes from the host. room() says how many the user can take now; input() is given at most that many.
 * Both run on the home loop. After room() was 0 the user calls chardev_more() (any thread) when there is
 * room again. Set before the VM starts. Main thread.
 */
struct chardev_user {
	size_t (*room)(struct chardev_user *u);
	void (*input)(struct chardev_user *u, const uint8_t *buf, size_t len);
	void (*event)(struct chardev_user *u, bool connected);  /* optional: a peer is there (told at first, if so), or went */
	void (*resized)(struct chardev_user *u);                /* optional: chardev_size() may say something else */
};
void chardev_attach(struct chardev *c, struct chardev_user *u);
void chardev_more(struct chardev *c);

/* The terminal's size in characters. Any thread. False: it is no terminal, or says nothing. */
bool chardev_size(const struct chardev *c, uint16_t *cols, uint16_t *rows);

/* See every byte the guest writes, before it goes out (panic recognition). Runs in chardev_write(). Set before the VM starts. */
void chardev_tap(struct chardev *c, void (*fn)(void *arg, const uint8_t *buf, size_t len), void *arg);

/* Wait until everything written so far is with the host, at most timeout_ms. Main thread. False: not all. */
bool chardev_flush(struct chardev *c, unsigned timeout_ms);
bool chardev_flush_all(unsigned timeout_ms);            /* every open one; the time is for all together */

void chardev_describe(const struct chardev *c, struct facts *f);        /* bytes in, out, dropped */

/*
 * The terminal. Raw mode is entered by chardev_stdio_start() when stdin is a terminal in the foreground
 * and something listens on "stdio", and left by chardev_stdio_restore(), which is async-signal-safe and
 * may be called any number of times. The escape key is Ctrl-A: x quits, h helps, c switches to the next
 * user of stdio, b sends a break, Ctrl-A itself is passed on. Before chardev_stdio_start() a terminal is not read;
 * a stdin that is no terminal has no escape key and is read as soon as somebody attaches.
 */
struct chardev_keys {
	void (*quit)(void *arg);        /* home loop */
	void (*send_break)(void *arg);  /* optional; home loop */
	void *arg;
};
void chardev_stdio_start(const struct chardev_keys *keys);      /* main thread */
void chardev_stdio_restore(void);
void chardev_stdio_resized(void);       /* SIGWINCH came; main thread */
#endif
