/*
 * How this works
 *
 * A guest sees what KVM says it can offer (KVM_GET_SUPPORTED_CPUID), with these changes: nested
 * virtualisation hidden, one package of N single-threaded cores whose APIC ids count from 0, the features
 * that only KVM's irqchip brings, the TSC frequency, and last the words of --cpu. A feature whose
 * prerequisite is gone goes too, so that no combination is one no CPU ever had.
 */
#include "cpuid.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"

#define CPUID_FIRST 128         /* entries asked for at first */
#define CPUID_MOST  1024        /* and at most */
#define CPUID_EXTRA 12          /* room for entries of ours */

#define KVM_LEAF        0x40000000u
#define KVM_LEAF_TIMING 0x40000010u     /* eax TSC kHz, ebx LAPIC timer kHz */
#define LAPIC_KHZ       1000000u        /* KVM's LAPIC counts nanoseconds */

static int ask_kvm(int kvm_fd, struct kvm_cpuid2 **ret)
{
	for (unsigned n = CPUID_FIRST; n <= CPUID_MOST; n *= 2) {
		struct kvm_cpuid2 *t = calloc(1, sizeof(*t) + n * sizeof(t->entries[0]));

		if (!t)
			return ENOMEM;
		t->nent = n;
		if (!ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, t)) {
			*ret = t;
			return 0;
		}
		free(t);
		if (errno != E2BIG)
			return errno;
	}
	return E2BIG;
}

const struct kvm_cpuid2 *cpuid_supported(int kvm_fd, struct error *err)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;        /* guards cached */
	static struct kvm_cpuid2 *cached;
	int e = 0;

	pthread_mutex_lock(&lock);
	if (!cached)
		e = ask_kvm(kvm_fd, &cached);
	pthread_mutex_unlock(&lock);
	if (e)
		error_errno(err, e, "cannot ask KVM which CPU features it offers");
	return cached;
}

struct kvm_cpuid_entry2 *cpuid_find(struct kvm_cpuid2 *t, uint32_t leaf, uint32_t sub)
{
	for (unsigned i = 0; i < t->nent; i++) {
		struct kvm_cpuid_entry2 *e = &t->entries[i];

		if (e->function == leaf && (e->index == sub || !(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX)))
			return e;
	}
	return NULL;
}

static void drop_leaf(struct kvm_cpuid2 *t, uint32_t leaf)
{
	unsigned n = 0;

	for (unsigned i = 0; i < t->nent; i++)
		if (t->entries[i].function != leaf)
			t->entries[n++] = t->entries[i];
	t->nent = n;
}

/* cpuid_build() left room for CPUID_EXTRA of these. */
static void put_leaf(struct kvm_cpuid2 *t, struct kvm_cpuid_entry2 e)
{
	t->entries[t->nent++] = e;
}

static uint32_t *feature_word(struct kvm_cpuid2 *t, const struct cpu_feature *f)
{
	struct kvm_cpuid_entry2 *e = cpuid_find(t, f->leaf, f->sub);
	uint32_t *regs[] = { e ? &e->eax : NULL, e ? &e->ebx : NULL, e ? &e->ecx : NULL,
		e ? &e->edx : NULL };

	return regs[f->reg];
}

static bool has(struct kvm_cpuid2 *t, const struct cpu_feature *f)
{
	uint32_t *w = feature_word(t, f);

	return w && *w >> f->bit & 1;
}

static bool has_name(struct kvm_cpuid2 *t, const char *name)
{
	return has(t, cpu_feature_find(name, strlen(name)));
}

static void set(struct kvm_cpuid2 *t, const struct cpu_feature *f, bool on)
{
	uint32_t *w = feature_word(t, f);

	if (w)
		*w = (*w & ~(1u << f->bit)) | (uint32_t)on << f->bit;
}

static void set_name(struct kvm_cpuid2 *t, const char *name, bool on)
{
	set(t, cpu_feature_find(name, strlen(name)), on);
}

static uint32_t max_basic(struct kvm_cpuid2 *t)
{
	struct kvm_cpuid_entry2 *e = cpuid_find(t, 0, 0);

	return e ? e->eax : 0;
}

static unsigned ceil_log2(unsigned n)
{
	return n > 1 ? 32 - __builtin_clz(n - 1) : 0;
}

/* Intel SDM 2A, CPUID leaf 0BH and 1FH: level 0 threads of a core, level 1 cores of the package. */
static void topology_levels(struct kvm_cpuid2 *t, uint32_t leaf, const struct cpuid_request *rq)
{
	struct kvm_cpuid_entry2 e = { .function = leaf, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
		.edx = rq->index };

	drop_leaf(t, leaf);
	e.ebx = 1;
	e.ecx = 1 << 8;
	put_leaf(t, e);
	e.index = 1;
	e.eax = ceil_log2(rq->cpus);
	e.ebx = rq->cpus & 0xffff;
	e.ecx = 2 << 8 | 1;
	put_leaf(t, e);
	e.index = 2;
	e.eax = e.ebx = 0;
	e.ecx = 2;
	put_leaf(t, e);
}

/* Leaf 4 (Intel) and 0x8000001d (AMD): first-level and second-level caches a core's own, the rest shared. */
static void cache_sharing(struct kvm_cpuid2 *t, uint32_t leaf, const struct cpuid_request *rq)
{
	unsigned ids = 1u << ceil_log2(rq->cpus);

	for (unsigned i = 0; i < t->nent; i++) {
		struct kvm_cpuid_entry2 *e = &t->entries[i];
		unsigned level = e->eax >> 5 & 7;

		if (e->function != leaf || !(e->eax & 0x1f))
			continue;
		e->eax &= 0x3fff;
		if (level > 2)
			e->eax |= (MIN(ids, 4096u) - 1) << 14;
		if (leaf == 0x4)
			e->eax |= (MIN(ids, 64u) - 1) << 26;
	}
}

static void topology(struct kvm_cpuid2 *t, const struct cpuid_request *rq)
{
	struct kvm_cpuid_entry2 *e = cpuid_find(t, 0x1, 0);

	if (e)
		e->ebx = (e->ebx & 0xffff) | (MIN(1u << ceil_log2(rq->cpus), 255u) << 16) |
			(rq->index & 0xff) << 24;
	set_name(t, "ht", rq->cpus > 1);
	cache_sharing(t, 0x4, rq);
	cache_sharing(t, 0x8000001d, rq);
	if (max_basic(t) >= 0xb)
		topology_levels(t, 0xb, rq);
	if (max_basic(t) >= 0x1f)
		topology_levels(t, 0x1f, rq);
	/* AMD APM 3, E.4.7: threads in the package, and how many bits of the APIC id number them. */
	e = cpuid_find(t, 0x80000008, 0);
	if (e)
		e->ecx = (e->ecx & ~0xf0ffu) | (MIN(rq->cpus, 256u) - 1) |
			MIN(ceil_log2(rq->cpus), 15u) << 12;
	e = cpuid_find(t, 0x8000001e, 0);
	if (e) {
		e->eax = rq->index;
		e->ebx = rq->index & 0xff;
		e->ecx = e->edx = 0;
	}
	drop_leaf(t, 0x80000026);       /* the host's own layout: guests then use leaf 0xb */
}

static bool is_intel(struct kvm_cpuid2 *t)
{
	struct kvm_cpuid_entry2 *e = cpuid_find(t, 0, 0);

	return e && e->ebx == 0x756e6547 && e->edx == 0x49656e69 && e->ecx == 0x6c65746e;
}

/*
 * Frequencies, so that no guest need measure. Guests take the crystal of leaf 0x15 for the LAPIC timer's
 * clock too, so ours is what KVM's LAPIC runs at, and the ratio gives the TSC.
 */
static void timing(struct kvm_cpuid2 *t, const struct cpuid_request *rq)
{
	struct kvm_cpuid_entry2 *kvm;

	if (!rq->tsc_khz)
		return;
	drop_leaf(t, KVM_LEAF_TIMING);
	kvm = cpuid_find(t, KVM_LEAF, 0);
	if (kvm) {
		kvm->eax = MAX(kvm->eax, KVM_LEAF_TIMING);
		put_leaf(t, (struct kvm_cpuid_entry2){ .function = KVM_LEAF_TIMING, .eax = rq->tsc_khz,
			.ebx = LAPIC_KHZ });
	}
	if (!is_intel(t) || max_basic(t) < 0x16)
		return;
	drop_leaf(t, 0x15);
	drop_leaf(t, 0x16);
	put_leaf(t, (struct kvm_cpuid_entry2){ .function = 0x15, .eax = LAPIC_KHZ, .ebx = rq->tsc_khz,
		.ecx = LAPIC_KHZ * 1000u });
	put_leaf(t, (struct kvm_cpuid_entry2){ .function = 0x16, .eax = rq->tsc_khz / 1000,
		.ebx = rq->tsc_khz / 1000 });
}

static int apply_spec(struct kvm_cpuid2 *t, struct kvm_cpuid2 *offered, const char *spec,
	struct error *err)
{
	struct cpu_word w;
	int r;

	while ((r = cpu_spec_next(&spec, &w, err)) > 0) {
		if (w.add && !has(offered, w.feature) && !has(t, w.feature))
			return error_set(err, EOPNOTSUPP, "--cpu: this host's KVM does not offer '%s'",
				w.feature->name);
		set(t, w.feature, w.add);
	}
	return r;
}

static void drop_dependents(struct kvm_cpuid2 *t)
{
	struct kvm_cpuid_entry2 *kvm;

	for (const struct cpu_feature *f = cpu_features; f->name; f++)
		if (f->needs && !has_name(t, f->needs))
			set(t, f, false);
	if (!has_name(t, "xsave"))
		drop_leaf(t, 0xd);
	if (!has_name(t, "svm"))
		drop_leaf(t, 0x8000000a);
	kvm = cpuid_find(t, KVM_LEAF | 1, 0);
	if (kvm && !has_name(t, "kvmclock"))
		kvm->eax &= ~1u;        /* its older interface */
}

static struct kvm_cpuid2 *copy_table(const struct kvm_cpuid2 *base)
{
	size_t used = sizeof(*base) + base->nent * sizeof(base->entries[0]);
	struct kvm_cpuid2 *t = calloc(1, used + CPUID_EXTRA * sizeof(base->entries[0]));

	if (t)
		memcpy(t, base, used);
	return t;
}

struct kvm_cpuid2 *cpuid_build(const struct kvm_cpuid2 *base, const struct cpuid_request *rq,
	struct error *err)
{
	auto_free struct kvm_cpuid2 *t = copy_table(base), *offered = copy_table(base);

	if (!t || !offered) {
		error_set(err, ENOMEM, "out of memory");
		return NULL;
	}
	set_name(t, "vmx", false);
	set_name(t, "svm", false);
	set_name(t, "hypervisor", true);
	set_name(t, "x2apic", true);
	set_name(t, "tsc_deadline_timer", rq->tsc_deadline);
	topology(t, rq);
	timing(t, rq);
	if (rq->spec && apply_spec(t, offered, rq->spec, err) < 0)
		return NULL;
	drop_dependents(t);
	return TAKE_PTR(t);
}
