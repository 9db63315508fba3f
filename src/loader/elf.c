#include "elf.h"
#include <elf.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "formats.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"

/*
 * How this works. elf_parse() copies the headers once, in 64-bit form, and proves the segments.
 * Which entry an ELF has is in its notes (Xen's PHYS32_ENTRY: PVH); in a compressed image they may
 * lie far behind the start, so they are read from guest RAM after the segments are placed.
 */
#define ELF_PHNUM_MAX     128
#define ELF_NOTE_MAX      (64u << 10)
#define NOTE_PHYS32       18    /* xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY */
#define SETUP_HEADER_2_15 0x26c /* where the header of protocol 2.15 ends */
#define CMDLINE_X86       2047  /* COMMAND_LINE_SIZE - 1 of an x86 kernel */
#define INITRD_MAX_X86    0x7fffffff
#define ALIGN_X86         0x200000

bool elf_is(const uint8_t *head, size_t len)
{
	return len >= EI_NIDENT && !memcmp(head, ELFMAG, SELFMAG);
}

const char *elf_machine_name(uint16_t machine)
{
	static const struct {
		uint16_t machine;
		const char *name;
	} names[] = { { EM_386, "i386" }, { EM_X86_64, "x86-64" }, { EM_AARCH64, "aarch64" },
		{ EM_ARM, "arm" }, { EM_RISCV, "riscv" }, { EM_PPC64, "ppc64" }, { EM_PPC, "ppc" },
		{ EM_S390, "s390" }, { EM_MIPS, "mips" }, { EM_SPARCV9, "sparc64" },
		{ 258 /* EM_LOONGARCH */, "loongarch" }, { EM_BPF, "bpf" } };

	for (size_t i = 0; i < ARRAY_LEN(names); i++)
		if (names[i].machine == machine)
			return names[i].name;
	return NULL;
}

const char *elf_class_name(const struct elf *e)
{
	return e->is64 ? "ELF64" : "ELF32";
}

/* Both classes' headers as the 64-bit one. */
static int header_read(struct source *src, Elf64_Ehdr *h, struct error *err)
{
	Elf32_Ehdr n;
	const char *machine;

	if (src->head_len < sizeof(*h))
		return error_set(err, EINVAL, "an ELF header is cut short");
	memcpy(h, src->head, sizeof(*h));
	if (h->e_ident[EI_CLASS] == ELFCLASS32) {
		memcpy(&n, src->head, sizeof(n));
		h->e_entry = n.e_entry;
		h->e_phoff = n.e_phoff;
		h->e_phentsize = n.e_phentsize;
		h->e_phnum = n.e_phnum;
	} else if (h->e_ident[EI_CLASS] != ELFCLASS64) {
		return error_set(err, EINVAL, "an ELF of class %u is neither 32-bit nor 64-bit",
			h->e_ident[EI_CLASS]);
	}
	machine = elf_machine_name(h->e_machine);
	if (h->e_ident[EI_DATA] != ELFDATA2LSB ||
		(h->e_machine != EM_386 && h->e_machine != EM_X86_64)) {
		if (machine && h->e_ident[EI_DATA] == ELFDATA2LSB)
			return error_set(err, ENOTSUP,
				"found an ELF for %s: give a kernel built for x86", machine);
		return error_set(err, ENOTSUP,
			"found an ELF for another machine (%s-endian, number %u): "
			"give a kernel built for x86",
			h->e_ident[EI_DATA] == ELFDATA2LSB ? "little" : "big", h->e_machine);
	}
	if (h->e_type == ET_REL)
		return error_set(
			err, ENOTSUP, "found an ELF object file: link it into an executable");
	if (h->e_type != ET_EXEC && h->e_type != ET_DYN)
		return error_set(
			err, ENOTSUP, "found an ELF of type %u: give an executable", h->e_type);
	return 0;
}

static int phdr_read(struct source *src, bool is64, uint64_t off, Elf64_Phdr *p, struct error *err)
{
	Elf32_Phdr n;
	int r;

	if (is64)
		return source_read(src, off, p, sizeof(*p), err);
	r = source_read(src, off, &n, sizeof(n), err);
	if (r < 0)
		return r;
	*p = (Elf64_Phdr){ .p_type = n.p_type,
		.p_offset = n.p_offset,
		.p_vaddr = n.p_vaddr,
		.p_paddr = n.p_paddr,
		.p_filesz = n.p_filesz,
		.p_memsz = n.p_memsz };
	return 0;
}

static int phdr_add(struct elf *e, const Elf64_Phdr *p, struct error *err)
{
	struct segment s = { p->p_offset, p->p_filesz, p->p_paddr, p->p_memsz, p->p_vaddr };

	if (p->p_type == PT_NOTE && e->nr_notes < ELF_NOTES) {
		e->note[e->nr_notes].off = p->p_offset;
		e->note[e->nr_notes++].len = MIN(p->p_filesz, ELF_NOTE_MAX);
	}
	if (p->p_type == PT_INTERP)
		return error_set(
			err, ENOTSUP, "found a dynamically linked Linux program, not a kernel");
	return p->p_type == PT_LOAD ? segments_add(&e->segs, &s, err) : 0;
}

int elf_parse(struct elf *e, struct source *src, struct error *err)
{
	Elf64_Ehdr h;
	size_t entsize;
	int r = header_read(src, &h, err);

	if (r < 0)
		return r;
	*e = (struct elf){ .is64 = h.e_ident[EI_CLASS] == ELFCLASS64, .entry = h.e_entry };
	entsize = e->is64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr);
	if (!h.e_phnum || h.e_phnum > ELF_PHNUM_MAX || h.e_phentsize != entsize)
		return error_set(err, EINVAL,
			"an ELF with %u program headers of %u bytes: 1 to %u of %zu can be",
			h.e_phnum, h.e_phentsize, ELF_PHNUM_MAX, entsize);
	if (h.e_phoff > src->size || h.e_phnum * entsize > src->size - h.e_phoff)
		return error_set(err, EINVAL, "its ELF program headers at 0x%llx lie past its end",
			(unsigned long long)h.e_phoff);
	for (unsigned i = 0; i < h.e_phnum; i++) {
		Elf64_Phdr p;

		r = phdr_read(src, e->is64, h.e_phoff + i * entsize, &p, err);
		if (!r)
			r = phdr_add(e, &p, err);
		if (r < 0)
			return r;
	}
	return segments_check(&e->segs, src, err);
}

int elf_entry_gpa(const struct elf *e, uint64_t entry, gpa_t *gpa, struct error *err)
{
	*gpa = entry;
	if (segments_hold(&e->segs, entry))
		return 0;
	for (unsigned i = 0; i < e->segs.nr; i++) {
		const struct segment *s = &e->segs.seg[i];

		if (entry >= s->vaddr && entry - s->vaddr < s->memsz) {
			*gpa = s->gpa + (entry - s->vaddr);
			return 0;
		}
	}
	return error_set(err, EINVAL, "its entry point 0x%llx lies in none of its segments",
		(unsigned long long)entry);
}

/* The note's bytes: from guest RAM when a placed segment holds them, else from the image. */
static int note_read(const struct elf *e, unsigned n, struct source *src, const struct gmem *mem,
	uint8_t *buf, struct error *err)
{
	uint64_t off = e->note[n].off, len = e->note[n].len;

	for (unsigned i = 0; mem && i < e->segs.nr; i++) {
		const struct segment *s = &e->segs.seg[i];

		if (off >= s->off && off - s->off <= s->filesz && len <= s->filesz - (off - s->off))
			return gmem_read(mem, s->gpa + (off - s->off), buf, len);
	}
	return source_read(src, off, buf, len, err);
}

/* One PT_NOTE's entries (gABI, Note Section): name and descriptor are padded to 4 bytes. */
static bool note_find(const uint8_t *buf, uint64_t len, uint64_t *entry)
{
	uint64_t at = 0;

	while (len - at >= sizeof(Elf64_Nhdr)) {
		uint64_t name, desc, descsz;
		Elf64_Nhdr h;

		memcpy(&h, buf + at, sizeof(h));
		at += sizeof(h);
		name = at;
		descsz = h.n_descsz;
		desc = at + (((uint64_t)h.n_namesz + 3) & ~3ull);
		at = desc + ((descsz + 3) & ~3ull);
		if (desc > len || descsz > len - desc)
			return false;
		if (h.n_type == NOTE_PHYS32 && h.n_namesz == 4 && !memcmp(buf + name, "Xen", 4) &&
			descsz >= 4) {
			*entry = 0;
			memcpy(entry, buf + desc, MIN(descsz, 8));
			return true;
		}
		if (at > len)
			return false;
	}
	return false;
}

/* The PVH entry: 1 found, 0 none, -errno. mem: where the segments are placed, or NULL before. */
static int pvh_find(const struct elf *e, struct source *src, const struct gmem *mem, gpa_t *gpa,
	struct error *err)
{
	auto_free uint8_t *buf = malloc(ELF_NOTE_MAX);

	if (!buf)
		return error_errno(err, ENOMEM, "cannot read its notes");
	for (unsigned i = 0; i < e->nr_notes; i++) {
		uint64_t entry;

		if (note_read(e, i, src, mem, buf, err) < 0 ||
			!note_find(buf, e->note[i].len, &entry))
			continue;
		if (entry >> 32 || !segments_hold(&e->segs, entry))
			return error_set(err, EINVAL,
				"its PVH entry 0x%llx lies in none of its segments",
				(unsigned long long)entry);
		*gpa = entry;
		return 1;
	}
	return 0;
}

static int no_entry(const struct elf *e, const struct image *img, struct error *err)
{
	if (img->entry == ENTRY_PVH)
		return error_set(err, EINVAL,
			"found an ELF without a PVH note: leave --kernel-entry=pvh out, or build "
			"it with CONFIG_PVH");
	return error_set(err, EINVAL,
		"found a %s-bit x86 ELF with neither a Multiboot header nor a PVH note: add one, "
		"or make it a flat binary",
		e->is64 ? "64" : "32");
}

static int elf_probe(struct image *img, struct error *err)
{
	struct elf e;
	gpa_t gpa;
	int r;

	if (!elf_is(img->src.head, img->src.head_len))
		return 0;
	r = elf_parse(&e, &img->src, err);
	if (r < 0)
		return r;
	if (img->src.compression) /* its notes may be out of reach until it is loaded */
		return 1;
	r = img->entry == ENTRY_LINUX64 ? 0 : pvh_find(&e, &img->src, NULL, &gpa, err);
	if (r)
		return r;
	if (!e.is64 || img->entry == ENTRY_PVH)
		return no_entry(&e, img, err);
	return elf_entry_gpa(&e, e.entry, &gpa, err) < 0 ? -EINVAL : 1;
}

/* A vmlinux brings no setup header: the one its bzImage would have had, as far as it matters. */
static void setup_make(struct boot_image *out)
{
	out->setup_header_len = SETUP_HEADER_2_15 - SETUP_HEADER;
	setup_put(out, SETUP_BOOT_FLAG, 2, 0xaa55);
	setup_put(out, SETUP_JUMP, 2, 0xeb | (SETUP_HEADER_2_15 - 0x202) << 8);
	setup_put(out, SETUP_MAGIC, 4, 0x53726448); /* "HdrS" */
	setup_put(out, SETUP_VERSION, 2, 0x20f);
	setup_put(out, SETUP_LOADFLAGS, 1, LOADFLAGS_HIGH);
	setup_put(out, SETUP_CODE32, 4, out->entry);
	setup_put(out, SETUP_INITRD_MAX, 4, INITRD_MAX_X86);
	setup_put(out, SETUP_ALIGNMENT, 4, ALIGN_X86);
	setup_put(out, SETUP_XLOADFLAGS, 2, XLF_KERNEL_64);
	setup_put(out, SETUP_CMDLINE_SIZE, 4, CMDLINE_X86);
	setup_put(out, SETUP_PREF_ADDRESS, 8, out->load_start);
	setup_put(out, SETUP_INIT_SIZE, 4, out->load_end - out->load_start);
}

static int elf_load(
	struct image *img, const struct gmem *mem, struct boot_image *out, struct error *err)
{
	const char *packed = img->src.compression;
	struct elf e;
	int r = elf_parse(&e, &img->src, err);

	if (!r)
		r = segments_fit(&e.segs, mem, err);
	if (!r)
		r = segments_load(&e.segs, &img->src, mem, err);
	if (r < 0)
		return r;
	out->load_start = e.segs.start;
	out->load_end = e.segs.end;
	r = img->entry == ENTRY_LINUX64 ? 0 : pvh_find(&e, &img->src, mem, &out->entry, err);
	if (r < 0)
		return r;
	if (!r && (!e.is64 || img->entry == ENTRY_PVH))
		return no_entry(&e, img, err);
	out->protocol = r ? BOOT_PVH : BOOT_LINUX64;
	if (!r) {
		r = elf_entry_gpa(&e, e.entry, &out->entry, err);
		if (r < 0)
			return r;
		setup_make(out);
	}
	format_set(out, "%s (%s%s%s)", elf_class_name(&e),
		out->protocol == BOOT_PVH ? "PVH" : "Linux 64-bit entry", packed ? ", " : "",
		packed ? packed : "");
	return 0;
}

const struct loader_class elf_loader = {
	.name = "an x86 ELF",
	.entries = 1u << ENTRY_AUTO | 1u << ENTRY_PVH | 1u << ENTRY_LINUX64,
	.probe = elf_probe,
	.load = elf_load,
};
