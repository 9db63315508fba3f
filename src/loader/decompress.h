#ifndef LOADER_DECOMPRESS_H
#define LOADER_DECOMPRESS_H
/*
 * Plain bytes out of a compressed file, pulled: the reader says where they go and how many it
 * wants, so nothing is produced that nobody asked for, and a kernel is decoded straight into guest
 * RAM.
 */
#include <stddef.h>
#include <stdint.h>
struct error;
struct unpack;

/* The compression that head begins ("gzip", "xz", "lzma", "zstd", "lz4"), or NULL. */
const char *unpack_name(const uint8_t *head, size_t len);

/* Read bytes [off, off+len) of fd, whose beginning is head. -ENOTSUP: no compression known here. */
int unpack_open(struct unpack **ret, int fd, uint64_t off, uint64_t len, const uint8_t *head,
	size_t head_len, struct error *err);
void unpack_close(struct unpack *u); /* NULL is fine */

/* The next len plain bytes; *got is less only at the end. -EBADMSG: damaged or cut short. */
int unpack_read(struct unpack *u, void *dst, size_t len, size_t *got, struct error *err);
#endif
