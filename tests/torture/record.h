#ifndef RECORD_H
#define RECORD_H
/* Every byte that goes to an image's file passes here (--wrap of the meta_ functions): to be written down, or to fail. */
#include <stdint.h>
#include <stddef.h>
#include "block/format.h"

struct record {
	enum { REC_WRITE, REC_ZERO, REC_PUNCH, REC_BARRIER } kind;
	uint64_t off, len;
	void *data;
};
extern struct record *records;
extern unsigned nr_records;
void record_start(void);
void record_stop(void);                 /* keeps them */
void record_clear(void);

/* From now on, call number `at` (1 is the next) fails with err; 0: none. Calls are counted in calls_made. */
extern unsigned fail_at, calls_made;
extern int fail_with;
/* Also EINTR and short transfers, at the level of the system calls: harmless, must be invisible. */
extern bool make_trouble;
#endif
