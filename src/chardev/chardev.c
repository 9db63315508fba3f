/* Handles: who uses a stream, what they wrote and were given. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include "chardev_priv.h"
#include "vmm/error.h"
#include "vmm/facts.h"

static struct chardev *open_chardevs;           /* main thread */

/* The stream for spec: a new one, or the one of stdio. */
static int get_stream(struct stream **ret, const char *spec, const char *name, struct loop *home,
	struct error *err)
{
	bool shared = !strcmp(spec, "stdio");
	struct stream *s;
	int r;

	if (shared && terminal_stream()) {
		*ret = terminal_stream();
		return 0;
	}
	s = stream_new(home);
	if (!s)
		return error_errno(err, ENOMEM, "cannot open '%s' for %s", spec, name);
	r = stream_open(s, spec, name, err);
	if (r) {
		stream_free(s);
		return r;
	}
	snprintf(s->name, sizeof(s->name), "%s", name);
	s->shared = shared;
	if (shared)
		terminal_set_stream(s);
	*ret = s;
	return 0;
}

int chardev_open(struct chardev **ret, const char *spec, const char *name, struct loop *home,
	struct error *err)
{
	struct chardev *c = calloc(1, sizeof(*c));
	_Atomic(struct chardev *) *end;
	int r;

	if (!c)
		return error_errno(err, ENOMEM, "cannot open '%s' for %s", spec, name);
	r = get_stream(&c->s, spec, name, home, err);
	if (r) {
		free(c);
		return r;
	}
	snprintf(c->name, sizeof(c->name), "%s", name);
	c->s->refs++;
	for (end = &c->s->users; atomic_load(end); end = &atomic_load(end)->next)
		;
	atomic_store(end, c);           /* whole: the loop may be walking the list */
	if (!c->s->shared)
		atomic_store(&c->s->focus, c);
	loop_post(c->s->home, &c->s->pump);
	c->next_open = open_chardevs;
	open_chardevs = c;
	*ret = c;
	return 0;
}

static void forget(void *arg)
{
	struct chardev *c = arg;
	struct stream *s = c->s;
	_Atomic(struct chardev *) *at = &s->users;

	while (atomic_load(at) != c)
		at = &atomic_load(at)->next;
	atomic_store(at, atomic_load(&c->next));
	if (atomic_load(&s->focus) == c)
		atomic_store(&s->focus, NULL);
	for (c = atomic_load(&s->users); c && !atomic_load(&s->focus); c = c->next)
		if (atomic_load(&c->user))
			atomic_store(&s->focus, c);
}

void chardev_free(struct chardev *c)
{
	struct chardev **at = &open_chardevs;

	if (!c)
		return;
	while (*at != c)
		at = &(*at)->next_open;
	*at = c->next_open;
	loop_call(c->s->home, forget, c);
	if (!--c->s->refs) {
		if (c->s->shared) {
			chardev_stdio_restore();
			terminal_set_stream(NULL);
		}
		stream_free(c->s);
	}
	free(c);
}

void chardev_write(struct chardev *c, const void *buf, size_t len)
{
	atomic_fetch_add_explicit(&c->bytes_out, len, memory_order_relaxed);
	if (c->tap)
		c->tap(c->tap_arg, buf, len);
	stream_write(c->s, buf, len);
}

void chardev_attach(struct chardev *c, struct chardev_user *u)
{
	struct chardev *none = NULL;

	atomic_store(&c->user, u);
	atomic_compare_exchange_strong(&c->s->focus, &none, c);
	loop_post(c->s->home, &c->s->pump);
}

void chardev_more(struct chardev *c)
{
	loop_post(c->s->home, &c->s->pump);
}

void chardev_tap(struct chardev *c, void (*fn)(void *arg, const uint8_t *buf, size_t len), void *arg)
{
	c->tap_arg = arg;
	c->tap = fn;
}

bool chardev_size(const struct chardev *c, uint16_t *cols, uint16_t *rows)
{
	struct winsize w;

	if (!c->s->shared || ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) || !w.ws_col || !w.ws_row)
		return false;
	*cols = w.ws_col;
	*rows = w.ws_row;
	return true;
}

bool chardev_flush(struct chardev *c, unsigned timeout_ms)
{
	struct stream *s = c->s;
	struct timespec end;
	uint64_t goal;
	bool done;
	int r = 0;

	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += timeout_ms / 1000;
	end.tv_nsec += timeout_ms % 1000 * 1000000l;
	if (end.tv_nsec >= 1000000000) {
		end.tv_sec++;
		end.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&s->lock);
	goal = s->accepted;
	while (s->settled < goal && !s->dead && s->ready && r != ETIMEDOUT)
		r = pthread_cond_timedwait(&s->moved, &s->lock, &end);
	done = s->settled >= goal || s->dead;
	pthread_mutex_unlock(&s->lock);
	return done;
}

void chardev_describe(const struct chardev *c, struct facts *f)
{
	struct stream *s = c->s;
	uint64_t dropped;

	pthread_mutex_lock(&s->lock);
	dropped = s->dropped;
	pthread_mutex_unlock(&s->lock);
	facts_u64(f, "bytes_out", atomic_load(&c->bytes_out));
	facts_u64(f, "bytes_in", atomic_load(&c->bytes_in));
	facts_u64(f, "bytes_dropped", dropped);
}

bool chardev_flush_all(unsigned timeout_ms)
{
	uint64_t end = loop_now() + timeout_ms * 1000000ull;
	bool done = true;

	for (struct chardev *c = open_chardevs; c; c = c->next_open) {
		uint64_t now = loop_now();

		done &= chardev_flush(c, now < end ? (unsigned)((end - now) / 1000000) : 0);
	}
	return done;
}
