#include "decompress.h"
#include <endian.h>
#include <errno.h>
#include <lz4.h>
#include <lz4frame.h>
#include <lzma.h>
#include <malloc.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <zlib.h>
#include <zstd.h>
#include "file.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. Each codec has one step function: take what is in the input buffer, write at most
 * len bytes to dst, say how many. unpack_read() repeats steps until the reader has what it asked
 * for, refilling the input buffer from the file in between. No codec keeps more than its window
 * (capped below), and output exists only as far as the reader pulls: a bomb costs its reader's own
 * bound and no more.
 *
 * Kernels packed with lz4 use the legacy frame: independent blocks of 8 MiB. A block goes straight
 * to dst where the reader wants at least a whole one, else through a buffer of that size.
 */
#define INPUT_CHUNK     (128u << 10)
#define CODEC_MEM_MAX   (192ull << 20) /* for xz and lzma: a dictionary of 128 MiB fits */
#define ZSTD_WINDOW_LOG 27             /* 128 MiB: the largest a kernel build uses */
#define LZ4_BLOCK       (8u << 20)     /* lz4 frame format, legacy frame */
#define LZ4_LEGACY      0x184c2102u
#define STEP_MAX        (1u << 30)

struct unpack;

struct codec {
	const char *name;
	uint8_t magic[6];
	uint8_t magic_len;
	bool raw_input; /* reads the file itself instead of the input buffer */
	int (*open)(struct unpack *u);
	/* 0, 1 at the end, or -errno. *produced: bytes written to dst. */
	int (*step)(struct unpack *u, uint8_t *dst, size_t len, size_t *produced);
	void (*close)(struct unpack *u);
};

struct unpack {
	const struct codec *codec;
	bool ended;
	/* input: file bytes [pos, end) are still to be read, buf[at, have) is next for the codec */
	int fd;
	uint64_t pos, end;
	uint8_t *buf;
	size_t at, have;
	union {
		z_stream z;
		lzma_stream xz;
		ZSTD_DCtx *zstd;
		LZ4F_dctx *lz4f;
		struct {
			uint8_t *in, *out;
			size_t in_size, at, have;
		} lz4;
	};
};

static int input_fill(struct unpack *u)
{
	size_t n = MIN(INPUT_CHUNK, u->end - u->pos);
	int r;

	if (u->at < u->have || !n)
		return 0;
	r = boot_file_pread(u->fd, u->pos, u->buf, n);
	if (r < 0)
		return r;
	u->pos += n;
	u->at = 0;
	u->have = n;
	return 0;
}

static int gzip_open(struct unpack *u)
{
	/* zlib.h: a window of 2^15, + 16 for the gzip wrapper */
	return inflateInit2(&u->z, 15 + 16) == Z_OK ? 0 : -ENOMEM;
}

static int gzip_step(struct unpack *u, uint8_t *dst, size_t len, size_t *produced)
{
	int r;

	u->z.next_in = u->buf + u->at;
	u->z.avail_in = u->have - u->at;
	u->z.next_out = dst;
	u->z.avail_out = len;
	r = inflate(&u->z, Z_NO_FLUSH);
	u->at = u->have - u->z.avail_in;
	*produced = len - u->z.avail_out;
	if (r == Z_STREAM_END)
		return 1;
	if (r == Z_MEM_ERROR)
		return -ENOMEM;
	return r == Z_OK || r == Z_BUF_ERROR ? 0 : -EBADMSG;
}

static void gzip_close(struct unpack *u)
{
	inflateEnd(&u->z);
}

static int xz_open(struct unpack *u)
{
	u->xz = (lzma_stream)LZMA_STREAM_INIT;
	return lzma_stream_decoder(&u->xz, CODEC_MEM_MAX, 0) == LZMA_OK ? 0 : -ENOMEM;
}

static int lzma_open(struct unpack *u)
{
	u->xz = (lzma_stream)LZMA_STREAM_INIT;
	return lzma_alone_decoder(&u->xz, CODEC_MEM_MAX) == LZMA_OK ? 0 : -ENOMEM;
}

static int xz_step(struct unpack *u, uint8_t *dst, size_t len, size_t *produced)
{
	lzma_ret r;

	u->xz.next_in = u->buf + u->at;
	u->xz.avail_in = u->have - u->at;
	u->xz.next_out = dst;
	u->xz.avail_out = len;
	r = lzma_code(&u->xz, LZMA_RUN);
	u->at = u->have - u->xz.avail_in;
	*produced = len - u->xz.avail_out;
	if (r == LZMA_STREAM_END)
		return 1;
	if (r == LZMA_MEM_ERROR || r == LZMA_MEMLIMIT_ERROR)
		return -ENOMEM;
	return r == LZMA_OK || r == LZMA_BUF_ERROR ? 0 : -EBADMSG;
}

static void xz_close(struct unpack *u)
{
	lzma_end(&u->xz);
}

static int zstd_open(struct unpack *u)
{
	u->zstd = ZSTD_createDCtx();
	if (!u->zstd)
		return -ENOMEM;
	ZSTD_DCtx_setParameter(u->zstd, ZSTD_d_windowLogMax, ZSTD_WINDOW_LOG);
	return 0;
}

static int zstd_step(struct unpack *u, uint8_t *dst, size_t len, size_t *produced)
{
	ZSTD_inBuffer in = { u->buf, u->have, u->at };
	ZSTD_outBuffer out = { dst, len, 0 };
	size_t r = ZSTD_decompressStream(u->zstd, &out, &in);

	u->at = in.pos;
	*produced = out.pos;
	if (ZSTD_isError(r))
		return -EBADMSG;
	return r == 0;
}

static void zstd_close(struct unpack *u)
{
	ZSTD_freeDCtx(u->zstd);
}

static int lz4f_open(struct unpack *u)
{
	return LZ4F_isError(LZ4F_createDecompressionContext(&u->lz4f, LZ4F_VERSION)) ? -ENOMEM : 0;
}

static int lz4f_step(struct unpack *u, uint8_t *dst, size_t len, size_t *produced)
{
	size_t out = len, in = u->have - u->at, r;

	r = LZ4F_decompress(u->lz4f, dst, &out, u->buf + u->at, &in, NULL);
	if (LZ4F_isError(r)) {
		*produced = 0;
		return -EBADMSG;
	}
	u->at += in;
	*produced = out;
	return r == 0;
}

static void lz4f_close(struct unpack *u)
{
	LZ4F_freeDecompressionContext(u->lz4f);
}

static int lz4_open(struct unpack *u)
{
	u->pos += 4;
	u->lz4.in_size = LZ4_COMPRESSBOUND(LZ4_BLOCK);
	/* Not from the heap: only what the blocks really use is touched, and all of it goes back. */
	u->lz4.in = mmap(NULL, u->lz4.in_size + LZ4_BLOCK, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (u->lz4.in == MAP_FAILED) {
		u->lz4.in = NULL;
		return -ENOMEM;
	}
	u->lz4.out = u->lz4.in + u->lz4.in_size;
	return 0;
}

/* The next block's bytes to lz4.in. 0 at the end of the file, else their number or -errno. */
static int lz4_block_read(struct unpack *u)
{
	uint32_t size;
	int r;

	do {
		if (u->end - u->pos < 4)
			return 0;
		r = boot_file_pread(u->fd, u->pos, &size, 4);
		if (r < 0)
			return r;
		u->pos += 4;
		size = le32toh(size);
	} while (size == LZ4_LEGACY); /* concatenated frames */
	if (!size || size > u->lz4.in_size || size > u->end - u->pos)
		return -EBADMSG;
	r = boot_file_pread(u->fd, u->pos, u->lz4.in, size);
	if (r < 0)
		return r;
	u->pos += size;
	return (int)size;
}

static int lz4_step(struct unpack *u, uint8_t *dst, size_t len, size_t *produced)
{
	bool direct = len >= LZ4_BLOCK;
	size_t n = MIN(len, u->lz4.have - u->lz4.at);
	int r;

	if (n) {
		memcpy(dst, u->lz4.out + u->lz4.at, n);
		u->lz4.at += n;
		*produced = n;
		return 0;
	}
	*produced = 0;
	r = lz4_block_read(u);
	if (r <= 0)
		return r ? r : 1;
	r = LZ4_decompress_safe(
		(const char *)u->lz4.in, (char *)(direct ? dst : u->lz4.out), r, LZ4_BLOCK);
	if (r <= 0)
		return -EBADMSG;
	if (direct) {
		*produced = r;
		return 0;
	}
	u->lz4.at = 0;
	u->lz4.have = r;
	return 0;
}

static void lz4_close(struct unpack *u)
{
	if (u->lz4.in)
		munmap(u->lz4.in, u->lz4.in_size + LZ4_BLOCK);
}

static const struct codec codecs[] = {
	{ "gzip", { 0x1f, 0x8b, 8 }, 3, false, gzip_open, gzip_step, gzip_close },
	{ "xz", { 0xfd, '7', 'z', 'X', 'Z', 0 }, 6, false, xz_open, xz_step, xz_close },
	{ "lzma", { 0x5d, 0, 0 }, 3, false, lzma_open, xz_step, xz_close },
	{ "zstd", { 0x28, 0xb5, 0x2f, 0xfd }, 4, false, zstd_open, zstd_step, zstd_close },
	{ "lz4", { 0x02, 0x21, 0x4c, 0x18 }, 4, true, lz4_open, lz4_step, lz4_close },
	{ "lz4", { 0x04, 0x22, 0x4d, 0x18 }, 4, false, lz4f_open, lz4f_step, lz4f_close },
};

static const struct codec *codec_find(const uint8_t *head, size_t len)
{
	for (size_t i = 0; i < ARRAY_LEN(codecs); i++)
		if (len >= codecs[i].magic_len &&
			!memcmp(head, codecs[i].magic, codecs[i].magic_len))
			return &codecs[i];
	return NULL;
}

const char *unpack_name(const uint8_t *head, size_t len)
{
	const struct codec *c = codec_find(head, len);

	return c ? c->name : NULL;
}

int unpack_open(struct unpack **ret, int fd, uint64_t off, uint64_t len, const uint8_t *head,
	size_t head_len, struct error *err)
{
	const struct codec *c = codec_find(head, head_len);
	struct unpack *u;

	if (!c)
		return error_set(err, ENOTSUP, "not compressed in a way known here");
	u = calloc(1, sizeof(*u));
	if (!u)
		return error_errno(err, ENOMEM, "%s", c->name);
	u->codec = c;
	u->fd = fd;
	u->pos = off;
	u->end = off + len;
	u->buf = c->raw_input ? NULL : malloc(INPUT_CHUNK);
	if (c->open(u) || (!c->raw_input && !u->buf)) {
		unpack_close(u);
		return error_errno(err, ENOMEM, "%s", c->name);
	}
	*ret = u;
	return 0;
}

void unpack_close(struct unpack *u)
{
	if (!u)
		return;
	u->codec->close(u);
	free(u->buf);
	free(u);
	malloc_trim(0); /* windows of many MiB: the heap would keep them for good */
}

int unpack_read(struct unpack *u, void *dst, size_t len, size_t *got, struct error *err)
{
	size_t done = 0;
	int r = 0;

	while (done < len && !u->ended) {
		size_t n = 0, before = u->at;
		uint64_t pos = u->pos;

		r = u->codec->raw_input ? 0 : input_fill(u);
		if (u->pos != pos)
			before = 0;
		if (!r)
			r = u->codec->step(u, (uint8_t *)dst + done, MIN(len - done, STEP_MAX), &n);
		done += n;
		if (r == 1)
			u->ended = true;
		else if (r < 0)
			break;
		else if (!n && u->at == before && u->pos == pos)
			r = -EBADMSG; /* cut short: neither input nor output is left */
		if (r < 0)
			break;
	}
	*got = done;
	if (r == -ENOMEM)
		return error_set(err, ENOMEM, "its %s data needs more than %llu MiB to unpack",
			u->codec->name, CODEC_MEM_MAX >> 20);
	if (r == -EBADMSG)
		return error_set(
			err, EBADMSG, "its %s data is damaged or cut short", u->codec->name);
	return r < 0 ? error_errno(err, -r, "cannot read it") : 0;
}
