#ifndef VMM_LOG_H
#define VMM_LOG_H
/*
 * Lines for the person at the terminal, on stderr, prefixed "vmm: ". Any thread; one write(2) a line.
 * Library code returns errors; it logs only what happens while the guest runs and has no caller to tell.
 */
#include <stdatomic.h>
#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level level);       /* main thread, before others exist; default LOG_WARN */
__attribute__((format(printf, 2, 3)))
void log_line(enum log_level level, const char *fmt, ...);

#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  log_line(LOG_WARN, __VA_ARGS__)
#define log_info(...)  log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)

/*
 * A line that a guest can cause: at most 10 a second for each limit (zero-initialise it), then silence
 * and, with the next line that gets through, the number that did not.
 */
struct log_limit {
	_Atomic uint64_t window;        /* second the count belongs to */
	_Atomic uint32_t count, dropped;
};
__attribute__((format(printf, 2, 3)))
void log_guest(struct log_limit *limit, const char *fmt, ...);
#endif
