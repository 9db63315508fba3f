#include "vmm/log.h"
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LINES_PER_SECOND 10

static enum log_level threshold = LOG_WARN;

void log_set_level(enum log_level level)
{
	threshold = level;
}

/* A guest's words never reach a terminal raw: no C0 controls, and no C1 controls (U+0080 to U+009F) in UTF-8. */
static void hide_controls(char *line, int n)
{
	unsigned char was = 0;

	for (unsigned char *p = (unsigned char *)line; p < (unsigned char *)line + n; was = *p++)
		if (*p < 0x20 || *p == 0x7f || (was == 0xc2 && *p < 0xa0))
			*p = '?';
}

/* One write a line, so that lines of several threads and of the guest do not mix. */
static void emit(const char *fmt, va_list ap, unsigned dropped)
{
	char line[1024];
	int n = snprintf(line, sizeof(line), "vmm: "), m;

	m = vsnprintf(line + n, sizeof(line) - n - 40, fmt, ap);
	if (m < 0)
		return;
	n += m < (int)sizeof(line) - n - 41 ? m : (int)sizeof(line) - n - 41;
	hide_controls(line, n);
	if (dropped)
		n += snprintf(line + n, sizeof(line) - n, " (%u more not shown)", dropped);
	line[n++] = '\n';
	if (write(STDERR_FILENO, line, n) < 0)
		return;         /* nobody listens; there is nothing else to tell it to */
}

void log_line(enum log_level level, const char *fmt, ...)
{
	va_list ap;

	if (level > threshold)
		return;
	va_start(ap, fmt);
	emit(fmt, ap, 0);
	va_end(ap);
}

void log_guest(struct log_limit *limit, const char *fmt, ...)
{
	struct timespec ts;
	uint64_t was;
	va_list ap;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
	was = atomic_load(&limit->window);
	if (was != (uint64_t)ts.tv_sec + 1 &&
		atomic_compare_exchange_strong(&limit->window, &was, (uint64_t)ts.tv_sec + 1))
		atomic_store(&limit->count, 0);
	if (atomic_fetch_add(&limit->count, 1) >= LINES_PER_SECOND) {
		atomic_fetch_add(&limit->dropped, 1);
		return;
	}
	if (threshold < LOG_WARN)
		return;
	va_start(ap, fmt);
	emit(fmt, ap, atomic_exchange(&limit->dropped, 0));
	va_end(ap);
}
