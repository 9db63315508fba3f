#include <endian.h>
#include <errno.h>
#include <string.h>
#include "elf.h"
#include "formats.h"
#include "place.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/* Multiboot Specification 0.6.96, section 3.1: a header in the first 8 KiB, 4-byte aligned. */
#define HEADER_WINDOW   8192u
#define HEADER_MAGIC    0x1badb002u
#define FLAG_PAGE_ALIGN (1u << 0)
#define FLAG_MEMORY     (1u << 1)
#define FLAG_VIDEO      (1u << 2)
#define FLAG_ADDRESSES  (1u << 16)
#define FLAGS_REQUIRED  0xffffu /* what the loader must understand or refuse */

struct header {
	uint64_t off; /* in the image */
	uint32_t flags;
	uint32_t header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
};

static uint32_t word_at(const uint8_t *head, uint64_t off)
{
	uint32_t v;

	memcpy(&v, head + off, 4);
	return le32toh(v);
}

static bool header_find(const struct source *src, struct header *h)
{
	size_t window = MIN(src->head_len, HEADER_WINDOW);

	for (uint64_t off = 0; off + 12 <= window; off += 4) {
		const uint8_t *p = src->head;

		if (word_at(p, off) != HEADER_MAGIC ||
			word_at(p, off) + word_at(p, off + 4) + word_at(p, off + 8))
			continue;
		*h = (struct header){ .off = off, .flags = word_at(p, off + 4) };
		if (!(h->flags & FLAG_ADDRESSES))
			return true;
		if (off + 32 > window)
			continue;
		h->header_addr = word_at(p, off + 12);
		h->load_addr = word_at(p, off + 16);
		h->load_end_addr = word_at(p, off + 20);
		h->bss_end_addr = word_at(p, off + 24);
		h->entry_addr = word_at(p, off + 28);
		return true;
	}
	return false;
}

/* 3.1.3: the image is one piece, placed as the header's addresses say. */
static int kludge_parse(
	const struct header *h, const struct source *src, struct segments *s, struct error *err)
{
	struct segment g = { .gpa = h->load_addr };
	uint32_t before = h->header_addr - h->load_addr;

	if (h->header_addr < h->load_addr || before > h->off)
		return error_set(err, EINVAL,
			"its Multiboot header loads at 0x%x, which is 0x%x bytes before a header "
			"found at 0x%llx",
			h->load_addr, before, (unsigned long long)h->off);
	g.off = h->off - before;
	if (!h->load_end_addr && src->compression)
		return error_set(err, ENOTSUP,
			"its Multiboot header does not say how long it is: decompress it");
	if (h->load_end_addr && h->load_end_addr < h->load_addr)
		return error_set(err, EINVAL,
			"its Multiboot header ends (0x%x) before it begins (0x%x)",
			h->load_end_addr, h->load_addr);
	g.filesz = h->load_end_addr ? h->load_end_addr - h->load_addr : src->size - g.off;
	g.memsz = g.filesz;
	if (h->bss_end_addr > h->load_addr)
		g.memsz = MAX(g.memsz, (uint64_t)h->bss_end_addr - h->load_addr);
	g.vaddr = g.gpa;
	return segments_add(s, &g, err);
}

static int flags_check(uint32_t flags, struct error *err)
{
	uint32_t unknown = flags & FLAGS_REQUIRED & ~(FLAG_PAGE_ALIGN | FLAG_MEMORY);

	if (unknown & FLAG_VIDEO)
		return error_set(err, ENOTSUP,
			"its Multiboot header asks for a video mode, and there is no display: "
			"clear bit 2 of its flags");
	if (unknown)
		return error_set(err, ENOTSUP,
			"its Multiboot header requires flags 0x%x, not known here", unknown);
	return 0;
}

static int multiboot_parse(
	struct image *img, struct header *h, struct elf *e, gpa_t *entry, struct error *err)
{
	struct source *src = &img->src;
	int r = flags_check(h->flags, err);

	if (r < 0)
		return r;
	if (h->flags & FLAG_ADDRESSES) {
		*e = (struct elf){ .entry = h->entry_addr };
		r = kludge_parse(h, src, &e->segs, err);
		if (!r)
			r = segments_check(&e->segs, src, err);
	} else if (elf_is(src->head, src->head_len)) {
		r = elf_parse(e, src, err);
	} else {
		return error_set(err, EINVAL,
			"its Multiboot header gives no addresses (flag 16), and it is no ELF "
			"either");
	}
	if (r < 0)
		return r;
	return elf_entry_gpa(e, e->entry, entry, err);
}

static int multiboot_probe(struct image *img, struct error *err)
{
	struct header h;
	struct elf e;
	gpa_t entry;

	if (!header_find(&img->src, &h))
		return 0;
	return multiboot_parse(img, &h, &e, &entry, err) < 0 ? -EINVAL : 1;
}

static int multiboot_load(
	struct image *img, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	struct header h;
	struct elf e;
	int r;

	if (!header_find(&img->src, &h))
		return error_set(
			err, EINVAL, "its Multiboot header has gone: the file was changed");
	r = multiboot_parse(img, &h, &e, &out->entry, err);
	if (!r)
		r = segments_fit(&e.segs, mem, err);
	if (!r)
		r = segments_load(&e.segs, &img->src, mem, err);
	if (r < 0)
		return r;
	out->protocol = BOOT_MULTIBOOT1;
	out->load_start = e.segs.start;
	out->load_end = e.segs.end;
	out->mb_flags = h.flags;
	out->mb_load_base = e.segs.start;
	format_set(out, "Multiboot 1 (%s%s%s)",
		h.flags & FLAG_ADDRESSES ? "flat" : elf_class_name(&e),
		img->src.compression ? ", " : "", img->src.compression ? img->src.compression : "");
	return 0;
}

const struct loader_class multiboot_loader = {
	.name = "a Multiboot kernel",
	.entries = 1u << ENTRY_AUTO | 1u << ENTRY_MULTIBOOT,
	.probe = multiboot_probe,
	.load = multiboot_load,
};
