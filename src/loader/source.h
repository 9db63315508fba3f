#ifndef LOADER_SOURCE_H
#define LOADER_SOURCE_H
/*
 * The plain bytes of a kernel image, whether the file holds them as they are or compressed.
 * Compressed ones come in ascending order only, except the first SOURCE_HEAD bytes, which stay at
 * hand.
 */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
struct error;
struct unpack;

#define SOURCE_HEAD (64u << 10) /* every header looked for begins in it (Multiboot 2: 32 KiB) */

struct source {
	int fd;        /* the caller's */
	uint64_t base; /* where in the file */
	uint64_t size; /* plain bytes; for a compressed file the most that may be asked for */
	const char *compression; /* "gzip", …, or NULL */
	struct unpack *unpack;
	uint64_t pos; /* of the next byte unpack gives */
	uint8_t *head;
	size_t head_len;
};

/*
 * Bytes [base, base+len) of fd. limit bounds what a compressed file may unfold to; 0: take the
 * bytes as they are. An unknown compression is no error: the bytes are then plain.
 */
int source_open(
	struct source *s, int fd, uint64_t base, uint64_t len, uint64_t limit, struct error *err);
void source_close(struct source *s); /* after a failed source_open() too */

/* All of [off, off+len) to dst. -ENODATA: past the end; -ESPIPE: compressed, and off lies behind.
 */
int source_read(struct source *s, uint64_t off, void *dst, uint64_t len, struct error *err);
#endif
