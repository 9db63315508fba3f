#include "vmm/panic.h"
#include <stdio.h>
#include <string.h>
#include "vmm/cleanup.h"
#include "vmm/vm.h"

/*
 * How this works. Bytes are gathered into a line of at most PANIC_LINE bytes; when the line ends, or is as
 * long as we look, its start decides. The rest of a judged line only waits for its newline, so a guest
 * that writes megabytes without one costs a memchr.
 */
static const char panic_start[] = "Kernel panic - not syncing";
static const char panic_end[] = "---[ end Kernel panic";

void panic_watch_init(struct panic_watch *w, struct vm *vm, const char *console)
{
	*w = (struct panic_watch){ .vm = vm, .console = console };
	pthread_mutex_init(&w->lock, NULL);
}

void panic_watch_done(struct panic_watch *w)
{
	pthread_mutex_destroy(&w->lock);
}

void panic_watch_reset(struct panic_watch *w)
{
	pthread_mutex_lock(&w->lock);
	w->len = 0;
	w->skip = w->over = w->reported = false;
	pthread_mutex_unlock(&w->lock);
}

/* What printk puts before the text: "<0>", "[   12.345678]", and "[    T1]" with CONFIG_PRINTK_CALLER. */
static const char *skip_prefix(const char *s)
{
	while (*s == '\r')
		s++;
	if (s[0] == '<' && s[1] >= '0' && s[1] <= '9' && s[2] == '>')
		s += 3;
	for (int group = 0; group < 2 && *s == '['; group++) {
		size_t n = strspn(s + 1, " 0123456789.TC");

		if (s[1 + n] != ']')
			break;
		s += n + 2;
	}
	return *s == ' ' ? s + 1 : s;
}

/* The words outlive this call: they end up in the result. */
static void report(struct panic_watch *w, const char *s)
{
	size_t n = strlen(s);

	while (n && (s[n - 1] == '\r' || s[n - 1] == ' '))
		n--;
	if (!w->reported)
		snprintf(w->how, sizeof(w->how), "%s: %.*s", w->console, (int)n, s);
	w->reported = true;
	vm_panic_seen(w->vm, w->how);
}

static void judge(struct panic_watch *w)
{
	const char *s;

	w->line[w->len] = '\0';
	s = skip_prefix(w->line);
	w->over = !strncmp(s, panic_end, sizeof(panic_end) - 1);
	if (w->over || !strncmp(s, panic_start, sizeof(panic_start) - 1))
		report(w, s);
	w->len = 0;
	w->skip = true;
}

static void end_line(struct panic_watch *w)
{
	if (!w->skip)
		judge(w);
	if (w->over)
		vm_panic_over(w->vm);
	w->skip = w->over = false;
}

void panic_watch_feed(void *watch, const uint8_t *buf, size_t len)
{
	struct panic_watch *w = watch;

	pthread_mutex_lock(&w->lock);
	while (len) {
		const uint8_t *nl = memchr(buf, '\n', len);
		size_t n = nl ? (size_t)(nl - buf) : len;

		if (!w->skip) {
			size_t take = MIN(n, sizeof(w->line) - 1 - w->len);

			memcpy(w->line + w->len, buf, take);
			w->len += take;
			if (w->len == sizeof(w->line) - 1)
				judge(w);
		}
		if (nl) {
			end_line(w);
			n++;
		}
		buf += n;
		len -= n;
	}
	pthread_mutex_unlock(&w->lock);
}
