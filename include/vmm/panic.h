#ifndef VMM_PANIC_H
#define VMM_PANIC_H
/*
 * Recognises a Linux kernel panic in what the guest writes to a console. Give panic_watch_feed to
 * chardev_tap() with the watch as its argument. Memory is one bounded line, however long the stream.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct vm;

#define PANIC_LINE 160          /* bytes of a line that are looked at */

struct panic_watch {
	struct vm *vm;
	const char *console;            /* "serial0": for the words of the result */
	pthread_mutex_t lock;           /* guards all below; vm_panic_seen() is called under it */
	unsigned len;
	bool skip;                      /* this line was judged: wait for its end */
	bool over;                      /* it is the panic's last line */
	char line[PANIC_LINE];
	bool reported;
	char how[PANIC_LINE + 16];      /* "serial0: Kernel panic - not syncing: …"; const once reported */
};

void panic_watch_init(struct panic_watch *w, struct vm *vm, const char *console);
void panic_watch_done(struct panic_watch *w);
void panic_watch_reset(struct panic_watch *w);  /* machine reset: a new line begins */

/*
 * A line that begins, after printk's own prefixes, with "Kernel panic - not syncing" calls vm_panic_seen();
 * the end of the line that begins with "---[ end Kernel panic" calls vm_panic_over(). Any thread; never waits.
 */
void panic_watch_feed(void *watch, const uint8_t *buf, size_t len);
#endif
