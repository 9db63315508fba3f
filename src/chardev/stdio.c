/* The terminal: raw mode and the escape key. */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>
#include "chardev_priv.h"

#define ESCAPE 0x01             /* Ctrl-A */

static struct stream *stdio;            /* main thread */
static struct chardev_keys keys;        /* const once stdio->terminal is set */
static struct termios cooked;           /* const while raw is set */
static volatile sig_atomic_t raw;

void terminal_set_stream(struct stream *s)
{
	stdio = s;
}

struct stream *terminal_stream(void)
{
	return stdio;
}

/* As QEMU and socat have it: all keys come through, Ctrl-C too; OPOST stays, so that lines of ours look right. */
static bool enter_raw(void)
{
	struct termios t;

	if (raw)
		return true;
	if (tcgetattr(STDIN_FILENO, &cooked))
		return false;
	t = cooked;
	t.c_iflag &= ~(tcflag_t)(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
	t.c_lflag &= ~(tcflag_t)(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
	t.c_cc[VMIN] = 1;
	t.c_cc[VTIME] = 0;
	raw = 1;
	if (!tcsetattr(STDIN_FILENO, TCSANOW, &t))
		return true;
	raw = 0;
	return false;
}

static bool somebody_listens(const struct stream *s)
{
	for (const struct chardev *c = atomic_load(&s->users); c; c = c->next)
		if (atomic_load(&c->user))
			return true;
	return false;
}

void chardev_stdio_start(const struct chardev_keys *k)
{
	if (!stdio || !somebody_listens(stdio) || !atomic_load(&stdio->hold_input) ||
		!stdio->foreground || !enter_raw())
		return;
	keys = *k;
	atomic_store(&stdio->terminal, true);
	atomic_store(&stdio->hold_input, false);
	loop_post(stdio->home, &stdio->pump);
}

void chardev_stdio_restore(void)
{
	if (!raw)
		return;
	raw = 0;
	tcsetattr(STDIN_FILENO, TCSANOW, &cooked);
}

static void resized(void *arg)
{
	struct stream *s = arg;

	for (struct chardev *c = atomic_load(&s->users); c; c = c->next) {
		struct chardev_user *u = atomic_load(&c->user);

		if (u && u->resized)
			u->resized(u);
	}
}

void chardev_stdio_resized(void)
{
	if (stdio)
		loop_call(stdio->home, resized, stdio);
}

/* --- keys; home loop --- */

static void say(struct stream *s, const char *words)
{
	stream_write(s, words, strlen(words));
}

static void help(struct stream *s)
{
	say(s, "\r\nCtrl-A x  quit\r\nCtrl-A c  keyboard to the next console\r\nCtrl-A b  send a break\r\n"
	       "Ctrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n");
}

static void focus_next(struct stream *s)
{
	struct chardev *was = atomic_load(&s->focus), *c = was;
	char line[64];

	if (!was)
		return;
	do {
		c = c->next ? c->next : atomic_load(&s->users);
	} while (c != was && !atomic_load(&c->user));
	atomic_store(&s->focus, c);
	snprintf(line, sizeof(line), "\r\n[%s]\r\n", c->name);
	say(s, line);
}

static void command(struct stream *s, uint8_t key)
{
	struct chardev *c = atomic_load(&s->focus);

	switch (key) {
	case ESCAPE:
		if (c)
			stream_input(c, &key, 1);
		break;
	case 'x':
		if (keys.quit)
			keys.quit(keys.arg);
		break;
	case 'h':
	case '?':
		help(s);
		break;
	case 'c':
		focus_next(s);
		break;
	case 'b':
		if (keys.send_break)
			keys.send_break(keys.arg);
		break;
	}
}

void terminal_keys(struct stream *s, const uint8_t *buf, size_t len)
{
	size_t from = 0;

	for (size_t i = 0; i < len; i++) {
		struct chardev *c = atomic_load(&s->focus);

		if (!s->escape && buf[i] != ESCAPE)
			continue;
		if (c && i > from)
			stream_input(c, buf + from, i - from);
		from = i + 1;
		if (s->escape)
			command(s, buf[i]);
		s->escape = !s->escape;
	}
	if (len > from && atomic_load(&s->focus))
		stream_input(atomic_load(&s->focus), buf + from, len - from);
}
