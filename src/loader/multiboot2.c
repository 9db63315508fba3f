#include <endian.h>
#include <errno.h>
#include <string.h>
#include "elf.h"
#include "formats.h"
#include "place.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * Multiboot2 Specification 2.0, section 3.1: a header in the first 32 KiB, 8-byte aligned, then
 * tags. A tag that is not marked optional must be understood or the image refused.
 */
#define HEADER_WINDOW    32768u
#define HEADER_MAGIC     0xe85250d6u
#define HEADER_SIZE      16u
#define ARCH_I386        0
#define TAG_SIZE         8u
#define TAG_OPTIONAL     1
#define INFO_TYPES       22 /* 3.6: types 0-21 of the boot information are defined */
#define CONSOLE_REQUIRED 1u
#define LOAD_FROM_START  0xffffffffu
#define MODULES_ALIGNED  1u /* mb_flags, as Multiboot 1 has it */
#define PREFER_HIGHEST   2

enum tag_type {
	TAG_END,
	TAG_INFO_REQUEST,
	TAG_ADDRESS,
	TAG_ENTRY,
	TAG_CONSOLE,
	TAG_FRAMEBUFFER,
	TAG_MODULE_ALIGN,
	TAG_EFI_BOOT_SERVICES,
	TAG_EFI32_ENTRY,
	TAG_EFI64_ENTRY,
	TAG_RELOCATABLE
};

struct header {
	uint64_t off; /* in the image */
	uint32_t len;
	bool has_address, has_entry, has_relocatable;
	uint32_t header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr;
	uint32_t min_addr, max_addr, align, preference;
	uint32_t flags;
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

	for (uint64_t off = 0; off + HEADER_SIZE <= window; off += 8) {
		const uint8_t *p = src->head + off;

		if (word_at(p, 0) != HEADER_MAGIC ||
			word_at(p, 0) + word_at(p, 4) + word_at(p, 8) + word_at(p, 12))
			continue;
		*h = (struct header){ .off = off, .len = word_at(p, 8) };
		return true;
	}
	return false;
}

static int info_request(const uint8_t *tag, uint32_t size, bool optional, struct error *err)
{
	for (uint32_t at = TAG_SIZE; at + 4 <= size && !optional; at += 4)
		if (word_at(tag, at) >= INFO_TYPES)
			return error_set(err, ENOTSUP,
				"its Multiboot 2 header requires information of type %u, not known "
				"here",
				word_at(tag, at));
	return 0;
}

static int refuse_display(bool optional, const char *what, struct error *err)
{
	return optional ? 0
			: error_set(err, ENOTSUP,
				  "its Multiboot 2 header requires %s, and there is no display: "
				  "mark the tag optional",
				  what);
}

/* size is at least need[type], and the tag lies in the header. */
static int tag_take(struct header *h, unsigned type, const uint8_t *tag, uint32_t size,
	bool optional, struct error *err)
{
	switch (type) {
	case TAG_INFO_REQUEST:
		return info_request(tag, size, optional, err);
	case TAG_ADDRESS:
		h->has_address = true;
		h->header_addr = word_at(tag, 8);
		h->load_addr = word_at(tag, 12);
		h->load_end_addr = word_at(tag, 16);
		h->bss_end_addr = word_at(tag, 20);
		return 0;
	case TAG_ENTRY:
		h->has_entry = true;
		h->entry_addr = word_at(tag, 8);
		return 0;
	case TAG_CONSOLE:
		if (word_at(tag, 8) & CONSOLE_REQUIRED)
			return refuse_display(optional, "a text console", err);
		return 0;
	case TAG_FRAMEBUFFER:
		return refuse_display(optional, "a framebuffer", err);
	case TAG_MODULE_ALIGN:
		h->flags |= MODULES_ALIGNED;
		return 0;
	case TAG_EFI_BOOT_SERVICES: /* these three concern EFI machines only */
	case TAG_EFI32_ENTRY:
	case TAG_EFI64_ENTRY:
		return 0;
	case TAG_RELOCATABLE:
		h->has_relocatable = true;
		h->min_addr = word_at(tag, 8);
		h->max_addr = word_at(tag, 12);
		h->align = word_at(tag, 16);
		h->preference = word_at(tag, 20);
		return 0;
	default:
		return optional ? 0
				: error_set(err, ENOTSUP,
					  "its Multiboot 2 header requires tag %u, not known here",
					  type);
	}
}

static int tags_read(const struct source *src, struct header *h, struct error *err)
{
	static const uint8_t need[] = { [TAG_ADDRESS] = 24,
		[TAG_ENTRY] = 12,
		[TAG_CONSOLE] = 12,
		[TAG_FRAMEBUFFER] = 20,
		[TAG_EFI32_ENTRY] = 12,
		[TAG_EFI64_ENTRY] = 12,
		[TAG_RELOCATABLE] = 24 };
	uint64_t at = HEADER_SIZE;

	if (word_at(src->head, h->off + 4) != ARCH_I386)
		return error_set(err, ENOTSUP,
			"found a Multiboot 2 kernel for another architecture (%u)",
			word_at(src->head, h->off + 4));
	if (h->len < HEADER_SIZE || h->len > MIN(src->head_len, HEADER_WINDOW) - h->off)
		return error_set(err, EINVAL,
			"its Multiboot 2 header of %u bytes reaches past 32 KiB", h->len);
	while (h->len - at >= TAG_SIZE) {
		const uint8_t *tag = src->head + h->off + at;
		uint32_t size = word_at(tag, 4), step = word_at(tag, 0);
		unsigned type = step & 0xffff;
		int r;

		if (type == TAG_END)
			return 0;
		if (size < TAG_SIZE || size > h->len - at ||
			(type < sizeof(need) && size < need[type]))
			return error_set(err, EINVAL,
				"its Multiboot 2 header has a tag %u of %u bytes", type, size);
		r = tag_take(h, type, tag, size, step >> 16 & TAG_OPTIONAL, err);
		if (r < 0)
			return r;
		at += (size + 7ull) & ~7ull;
		if (at > h->len)
			break;
	}
	return error_set(err, EINVAL, "its Multiboot 2 header has no end tag");
}

/* 3.1.6: the image is one piece, placed as the address tag says. */
static int addresses_parse(
	const struct header *h, const struct source *src, struct segments *s, struct error *err)
{
	uint64_t before = (uint64_t)h->header_addr - h->load_addr;
	struct segment g = { .gpa = h->load_addr, .vaddr = h->load_addr };

	if (h->load_addr == LOAD_FROM_START) {
		before = h->off;
		g.gpa = g.vaddr = (uint64_t)h->header_addr - h->off;
	}
	if (before > h->off || g.gpa > UINT32_MAX)
		return error_set(err, EINVAL,
			"its Multiboot 2 header at 0x%llx says it is at 0x%x of an image loaded at "
			"0x%x",
			(unsigned long long)h->off, h->header_addr, h->load_addr);
	g.off = h->off - before;
	if (!h->load_end_addr && src->compression)
		return error_set(err, ENOTSUP,
			"its Multiboot 2 header does not say how long it is: decompress it");
	if (h->load_end_addr && h->load_end_addr < g.gpa)
		return error_set(err, EINVAL,
			"its Multiboot 2 image ends (0x%x) before it begins (0x%llx)",
			h->load_end_addr, (unsigned long long)g.gpa);
	g.filesz = h->load_end_addr ? h->load_end_addr - g.gpa : src->size - g.off;
	g.memsz = g.filesz;
	if (h->bss_end_addr > g.gpa)
		g.memsz = MAX(g.memsz, h->bss_end_addr - g.gpa);
	return segments_add(s, &g, err);
}

static int multiboot2_parse(
	struct image *img, struct header *h, struct elf *e, gpa_t *entry, struct error *err)
{
	struct source *src = &img->src;
	int r = tags_read(src, h, err);

	if (r < 0)
		return r;
	if (h->has_address) {
		if (!h->has_entry)
			return error_set(err, EINVAL,
				"its Multiboot 2 header has an address tag, but no entry tag");
		*e = (struct elf){ 0 };
		r = addresses_parse(h, src, &e->segs, err);
		if (!r)
			r = segments_check(&e->segs, src, err);
	} else if (elf_is(src->head, src->head_len)) {
		r = elf_parse(e, src, err);
	} else {
		return error_set(err, EINVAL,
			"its Multiboot 2 header has no address tag, and it is no ELF either");
	}
	if (r < 0)
		return r;
	if (h->has_entry)
		e->entry = h->entry_addr;
	return elf_entry_gpa(e, e->entry, entry, err);
}

/*
 * 3.1.12: the tag gives the range the image may be in. Where it was linked to is taken when that is
 * in the range and in RAM; else it moves to the lowest (or, if it prefers that, highest) place that
 * is.
 */
static int relocate(const struct header *h, struct elf *e, gpa_t *entry, const struct gmem *mem,
	struct error *err)
{
	uint64_t len = e->segs.end - e->segs.start, align = MAX(h->align, 1u), at, delta;

	if (!h->has_relocatable)
		return 0;
	if (align & (align - 1))
		return error_set(err, EINVAL,
			"its Multiboot 2 relocation alignment 0x%x is no power of two", h->align);
	if (e->segs.start >= h->min_addr && e->segs.end - 1 <= h->max_addr &&
		gmem_at(mem, e->segs.start, len))
		return 0;
	if (h->preference == PREFER_HIGHEST) {
		at = place_high(mem, len, (uint64_t)h->max_addr + 1, h->min_addr);
		at = at == UINT64_MAX ? at : at & ~(align - 1);
	} else {
		at = (MAX(h->min_addr, PLACE_BIOS_END) + align - 1) & ~(align - 1);
	}
	if (at < MAX(h->min_addr, PLACE_BIOS_END) || at > h->max_addr ||
		len - 1 > h->max_addr - at || !gmem_at(mem, at, len))
		return error_set(err, ENOSPC,
			"its %llu KiB fit nowhere in 0x%x-0x%x, the addresses it can be relocated "
			"to",
			(unsigned long long)len >> 10, h->min_addr, h->max_addr);
	delta = at - e->segs.start;
	for (unsigned i = 0; i < e->segs.nr; i++)
		e->segs.seg[i].gpa += delta;
	e->segs.start += delta;
	e->segs.end += delta;
	*entry += delta;
	return 0;
}

static int multiboot2_probe(struct image *img, struct error *err)
{
	struct header h;
	struct elf e;
	gpa_t entry;

	if (!header_find(&img->src, &h))
		return 0;
	return multiboot2_parse(img, &h, &e, &entry, err) < 0 ? -EINVAL : 1;
}

static int multiboot2_load(
	struct image *img, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	struct header h;
	struct elf e;
	int r;

	if (!header_find(&img->src, &h))
		return error_set(
			err, EINVAL, "its Multiboot 2 header has gone: the file was changed");
	r = multiboot2_parse(img, &h, &e, &out->entry, err);
	if (!r)
		r = relocate(&h, &e, &out->entry, mem, err);
	if (!r)
		r = segments_fit(&e.segs, mem, err);
	if (!r)
		r = segments_load(&e.segs, &img->src, mem, err);
	if (r < 0)
		return r;
	out->protocol = BOOT_MULTIBOOT2;
	out->load_start = e.segs.start;
	out->load_end = e.segs.end;
	out->mb_flags = h.flags;
	out->mb_load_base = e.segs.start;
	format_set(out, "Multiboot 2 (%s%s%s)", h.has_address ? "flat" : elf_class_name(&e),
		img->src.compression ? ", " : "", img->src.compression ? img->src.compression : "");
	return 0;
}

const struct loader_class multiboot2_loader = {
	.name = "a Multiboot 2 kernel",
	.entries = 1u << ENTRY_AUTO | 1u << ENTRY_MULTIBOOT2,
	.probe = multiboot2_probe,
	.load = multiboot2_load,
};
