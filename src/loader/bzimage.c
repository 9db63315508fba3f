#include <errno.h>
#include <stdio.h>
#include <string.h>
#include "elf.h"
#include "formats.h"
#include "place.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. A bzImage is setup_sects sectors of real-mode code, the setup header among them,
 * then a self-decompressor with the kernel proper (the payload) inside. There are two ways in:
 *
 *   unpack   The payload is a compressed vmlinux ELF. It is decoded here, natively and straight to
 *            its place, and entered at its own 64-bit entry. The self-decompressor would do three
 *            things more, none of them needed: move itself out of the way, apply relocations (the
 *            kernel runs where it was linked, so there are none to apply) and choose a random
 *            address (the kernel sees the KASLR flag clear and leaves its other areas where they
 *            are too). Only the decompressor turns 5-level paging on, so that stays off.
 *   bzimage  The protected-mode part goes to 1 MiB whole, and is entered at +0x200 (64-bit) or
 *            +0 (32-bit).
 *
 * Either way the RAM from the kernel's run address on, init_size long, is taken: it is what the
 * kernel uses before it knows of memory at all.
 *
 * Source: the Linux/x86 boot protocol, Documentation/arch/x86/boot.rst.
 */
#define SECTOR          512u
#define BZIMAGE_BASE    0x100000ull
#define ENTRY64_OFFSET  0x200
#define PROTOCOL_MIN    0x206 /* cmdline_size; older ones are kernels before 2.6.22 */
#define PROTOCOL_UNPACK 0x208 /* payload_offset */
#define PROTOCOL_INIT   0x20a /* pref_address, init_size */
#define PROTOCOL_XLF    0x20c /* xloadflags */
#define MAGIC_HDRS      0x53726448u
#define NAME_MAX_LEN    40
#define SIZE_TRAILER    4            /* payload: the plain size follows the compressed bytes */
#define PLAIN_MAX       (1ull << 30) /* of a payload whose trailer says more */

struct bzimage {
	uint64_t code; /* file offset of the protected-mode part */
	uint64_t code_len;
	unsigned version;
	bool has64;
	uint64_t run, init_size; /* 0: the header is too old to say */
	char name[NAME_MAX_LEN]; /* "6.1.0-56-cloud-amd64" */
};

/* The first word of the version string, printable characters only. */
static void name_read(struct bzimage *b, struct image *img, unsigned at)
{
	uint8_t buf[NAME_MAX_LEN - 1];
	uint64_t off = (uint64_t)at + 0x200;
	unsigned n = 0;

	if (at && off < b->code && b->code - off >= sizeof(buf) &&
		!source_read(&img->src, off, buf, sizeof(buf), NULL))
		for (; n < sizeof(buf) && buf[n] > ' ' && buf[n] < 0x7f; n++)
			b->name[n] = (char)buf[n];
	b->name[n] = 0;
}

static uint64_t align_up(uint64_t v, uint64_t to)
{
	return to && !(to & (to - 1)) ? (v + to - 1) & ~(to - 1) : v;
}

/* The setup header to out->setup_header: 0x1f1 to where its jump instruction goes. */
static int header_copy(struct image *img, struct boot_image *out, struct error *err)
{
	unsigned end = 0x202 + img->src.head[SETUP_JUMP + 1];

	end = MIN(end, SETUP_HEADER_END);
	if (end < SETUP_CMDLINE_SIZE + 4)
		return error_set(
			err, EINVAL, "its setup header ends at 0x%x already: damaged?", end);
	memset(out->setup_header, 0, sizeof(out->setup_header));
	memcpy(out->setup_header, img->src.head + SETUP_HEADER, end - SETUP_HEADER);
	out->setup_header_len = end - SETUP_HEADER;
	return 0;
}

/* Where the kernel will run, and how much RAM it takes from there. */
static void extent_read(struct bzimage *b, const struct boot_image *out)
{
	uint64_t pref = setup_get(out, SETUP_PREF_ADDRESS, 4) |
			(uint64_t)setup_get(out, SETUP_PREF_ADDRESS + 4, 4) << 32;

	if (b->version < PROTOCOL_INIT)
		return;
	b->run = pref;
	b->init_size = setup_get(out, SETUP_INIT_SIZE, 4);
	if (setup_get(out, SETUP_RELOCATABLE, 1))
		b->run = MAX(pref, align_up(BZIMAGE_BASE, setup_get(out, SETUP_ALIGNMENT, 4)));
}

static int bzimage_parse(
	struct bzimage *b, struct image *img, struct boot_image *out, struct error *err)
{
	const uint8_t *head = img->src.head;
	uint64_t need;
	int r;

	*b = (struct bzimage){ 0 };
	if (img->src.head_len < SETUP_HEADER_END)
		return error_set(err, EINVAL, "found a Linux bzImage cut short to %llu bytes",
			(unsigned long long)img->src.size);
	r = header_copy(img, out, err);
	if (r < 0)
		return r;
	b->version = setup_get(out, SETUP_VERSION, 2);
	if (b->version < PROTOCOL_MIN)
		return error_set(err, ENOTSUP,
			"found a Linux kernel with boot protocol %u.%02u: 2.06 (Linux 2.6.22) is "
			"the oldest accepted",
			b->version >> 8, b->version & 0xff);
	if (!(setup_get(out, SETUP_LOADFLAGS, 1) & LOADFLAGS_HIGH))
		return error_set(err, ENOTSUP, "found a Linux zImage: build a bzImage");
	b->code = ((head[SETUP_HEADER] ? head[SETUP_HEADER] : 4u) + 1) * SECTOR;
	need = setup_get(out, SETUP_SYSSIZE, 4) * 16ull;
	/* syssize counts paragraphs: up to 15 bytes of the last may be missing */
	if (b->code >= img->src.size || need > img->src.size - b->code + 15)
		return error_set(err, EINVAL,
			"found a Linux bzImage cut short: it has %llu of %llu bytes",
			(unsigned long long)img->src.size, (unsigned long long)(b->code + need));
	b->code_len = img->src.size - b->code;
	b->has64 =
		b->version >= PROTOCOL_XLF && setup_get(out, SETUP_XLOADFLAGS, 2) & XLF_KERNEL_64;
	if (img->entry == ENTRY_UNPACK && !b->has64)
		return error_set(err, EINVAL,
			"found a 32-bit Linux kernel: it cannot be unpacked, use "
			"--kernel-entry=bzimage32");
	extent_read(b, out);
	name_read(b, img, setup_get(out, SETUP_KERNEL_NAME, 2));
	return 0;
}

static int bzimage_probe(struct image *img, struct error *err)
{
	const uint8_t *head = img->src.head;
	struct boot_image scratch = { 0 };
	struct bzimage b;
	uint32_t magic;

	if (img->src.compression || img->src.head_len < SETUP_VERSION + 2 ||
		head[SETUP_BOOT_FLAG] != 0x55 || head[SETUP_BOOT_FLAG + 1] != 0xaa)
		return 0;
	magic = head[0x202] | head[0x203] << 8 | head[0x204] << 16 | (uint32_t)head[0x205] << 24;
	if (magic != MAGIC_HDRS)
		return 0;
	return bzimage_parse(&b, img, &scratch, err) < 0 ? -EINVAL : 1;
}

static int ram_check(const struct bzimage *b, const struct gmem *mem, struct error *err)
{
	if (b->code_len > UINT32_MAX || !gmem_at(mem, BZIMAGE_BASE, b->code_len))
		return error_set(err, ENOSPC,
			"its %llu KiB do not fit into RAM (--mem is %llu MiB)",
			(unsigned long long)b->code_len >> 10,
			(unsigned long long)(gmem_total(mem) >> 20));
	if (b->init_size && !gmem_at(mem, b->run, b->init_size))
		return error_set(err, ENOSPC,
			"it needs %llu MiB of RAM from %llu MiB on, and --mem is %llu MiB: give at "
			"least %llu MiB",
			(unsigned long long)(b->init_size + 0xfffff) >> 20,
			(unsigned long long)b->run >> 20,
			(unsigned long long)(gmem_total(mem) >> 20),
			(unsigned long long)(b->run + b->init_size + 0xfffff) >> 20);
	return 0;
}

/*
 * The payload as a source of plain bytes. -ENOTSUP, with words: its place is not known or its
 * compression is not.
 */
static int payload_open(const struct bzimage *b, struct image *img, const struct boot_image *out,
	struct source *s, struct error *err)
{
	uint64_t off = setup_get(out, SETUP_PAYLOAD, 4), len = setup_get(out, SETUP_PAYLOAD_LEN, 4);
	uint8_t trailer[SIZE_TRAILER];
	uint32_t plain;
	int r;

	if (b->version < PROTOCOL_UNPACK || !b->has64 || len <= SIZE_TRAILER)
		return error_set(err, ENOTSUP, "its header does not say where the kernel in it is");
	if (off > b->code_len || len > b->code_len - off)
		return error_set(err, EBADMSG, "its payload 0x%llx+0x%llx lies past its end",
			(unsigned long long)off, (unsigned long long)len);
	r = source_read(&img->src, b->code + off + len - SIZE_TRAILER, trailer, SIZE_TRAILER, err);
	if (r < 0)
		return r;
	plain = trailer[0] | trailer[1] << 8 | trailer[2] << 16 | (uint32_t)trailer[3] << 24;
	r = source_open(s, img->file.fd, b->code + off, len, MIN(plain, PLAIN_MAX), err);
	if (r < 0)
		return r;
	if (!elf_is(s->head, s->head_len))
		return error_set(
			err, ENOTSUP, "the kernel in it is compressed in a way not known here");
	return 0;
}

/* The vmlinux to its place. */
static int vmlinux_load(const struct bzimage *b, struct source *s, const struct gmem *mem,
	struct boot_image *out, struct error *err)
{
	struct elf e;
	int r = elf_parse(&e, s, err);

	if (!r)
		r = elf_entry_gpa(&e, e.entry, &out->entry, err);
	if (r < 0)
		return r;
	if (!e.is64 || e.segs.start < b->run || e.segs.end - b->run > MAX(b->init_size, 1))
		return error_set(
			err, ENOTSUP, "the kernel in it is not linked to where it says it runs");
	r = segments_fit(&e.segs, mem, err);
	if (!r)
		r = segments_load(&e.segs, s, mem, err);
	if (r < 0)
		return r;
	out->protocol = BOOT_LINUX64;
	out->load_start = e.segs.start;
	out->load_end = b->run + b->init_size;
	setup_put(out, SETUP_LOADFLAGS, 1, setup_get(out, SETUP_LOADFLAGS, 1) & ~LOADFLAGS_KASLR);
	format_set(out, "bzImage %s (unpacked%s%s)", b->name, s->compression ? ", " : "",
		s->compression ? s->compression : "");
	return 0;
}

static int unpack(const struct bzimage *b, struct image *img, const struct gmem *mem,
	struct boot_image *out, struct error *err)
{
	struct source s = { 0 };
	int r = payload_open(b, img, out, &s, err);

	if (!r)
		r = vmlinux_load(b, &s, mem, out, err);
	source_close(&s);
	return r;
}

/* The protected-mode part to 1 MiB. */
static int own_entry(const struct bzimage *b, struct image *img, const struct gmem *mem,
	struct boot_image *out, struct error *err)
{
	bool use64 = b->has64 && img->entry != ENTRY_BZIMAGE32;
	void *dst = gmem_at(mem, BZIMAGE_BASE, b->code_len);
	int r;

	if (use64 && b->code_len <= ENTRY64_OFFSET)
		return error_set(err, EINVAL,
			"found a Linux bzImage without a 64-bit entry in its %llu bytes",
			(unsigned long long)b->code_len);
	r = source_read(&img->src, b->code, dst, b->code_len, err);
	if (r < 0)
		return r;
	out->protocol = use64 ? BOOT_LINUX64 : BOOT_LINUX32;
	out->entry = BZIMAGE_BASE + (use64 ? ENTRY64_OFFSET : 0);
	out->load_start = BZIMAGE_BASE;
	out->load_end = MAX(BZIMAGE_BASE + b->code_len, b->run + b->init_size);
	setup_put(out, SETUP_CODE32, 4, BZIMAGE_BASE);
	format_set(out, "bzImage %s (own %s-bit entry)", b->name, use64 ? "64" : "32");
	return 0;
}

static int bzimage_load(
	struct image *img, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	struct bzimage b;
	int r = bzimage_parse(&b, img, out, err);

	if (!r)
		r = ram_check(&b, mem, err);
	if (r < 0)
		return r;
	if (img->entry == ENTRY_AUTO || img->entry == ENTRY_UNPACK) {
		r = unpack(&b, img, mem, out, err);
		/* What is damaged it could not unpack itself either; what is only strange it can. */
		if (!r || r == -EBADMSG || r == -ENODATA || img->entry == ENTRY_UNPACK)
			return r;
	}
	return own_entry(&b, img, mem, out, err);
}

const struct loader_class bzimage_loader = {
	.name = "a Linux bzImage",
	.entries =
		1u << ENTRY_AUTO | 1u << ENTRY_UNPACK | 1u << ENTRY_BZIMAGE | 1u << ENTRY_BZIMAGE32,
	.probe = bzimage_probe,
	.load = bzimage_load,
};
