#ifndef CLI_RESULT_H
#define CLI_RESULT_H
/* --result FILE: what happened, as one JSON object. Main thread. */
#include <stdint.h>
#include "vmm/vm.h"
struct error;

struct result {
	int fd, self;           /* the file, /proc/self/status; opened before the sandbox is shut; -1: nobody asked */
	uint64_t start_ns;      /* when vmm began, CLOCK_MONOTONIC */
	const char *path;
};

int  result_open(struct result *r, const char *path, struct error *err);
/* vm may be NULL: vmm failed before there was one. */
int  result_write(struct result *r, struct vm *vm, const struct vm_stop *stop, struct error *err);
#endif
