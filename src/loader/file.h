#ifndef LOADER_FILE_H
#define LOADER_FILE_H
/*
 * Files the loader reads: opened once, regular, and read by pread so that a file that shrinks is an
 * error and no signal.
 */
#include <stddef.h>
#include <stdint.h>
struct error;

struct boot_file {
	int fd;
	uint64_t size; /* when it was opened */
};

/* what: "kernel", "initrd", …, for messages. Refuses all but regular files with bytes in them. */
int boot_file_open(struct boot_file *f, const char *what, const char *path, struct error *err);
void boot_file_close(struct boot_file *f);

/* Exactly len bytes. 0, -errno, or -ENODATA when the file ends before. */
int boot_file_pread(int fd, uint64_t off, void *dst, size_t len);
#endif
