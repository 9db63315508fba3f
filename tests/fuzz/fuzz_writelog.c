/* A write log from anywhere, listed and put into a disk of 1 MiB. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "cli/replay.h"
#include "vmm/error.h"

#define SIZE (1u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	int file = memfd_create("log", 0), disk = memfd_create("disk", 0);
	char path[40], mark[WRITELOG_MARK_MAX];
	struct replay_cursor c = LOG_START;
	struct error err = { 0 };
	struct replay_entry e;
	struct replay_log l;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	if (write(file, data, size) != (ssize_t)size || ftruncate(disk, SIZE))
		abort();
	if (!log_open(&l, path, &err)) {
		while (log_next(&l, &c, UINT64_MAX, &e, mark, &err) > 0)
			;
		c = LOG_START;
		while (log_next(&l, &c, SIZE, &e, NULL, &err) > 0)
			if (raw_apply(disk, &l, &e, 0, e.len, &err) || (e.len && e.off > SIZE - e.len))
				abort();
		if (lseek(disk, 0, SEEK_END) != SIZE)
			abort();
		log_close(&l);
	}
	close(file);
	close(disk);
	return 0;
}
