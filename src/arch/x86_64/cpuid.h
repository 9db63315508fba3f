#ifndef ARCH_X86_64_CPUID_H
#define ARCH_X86_64_CPUID_H
/* CPUID as a guest sees it. Private to src/arch/x86_64. */
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
struct error;

/* What one vCPU is told apart from what the host's KVM offers. */
struct cpuid_request {
	const char *spec;               /* --cpu: "host,-cx16,+vmx"; NULL: "host" */
	unsigned index, cpus;           /* this vCPU; how many there are */
	uint32_t tsc_khz;               /* 0: not known */
	bool tsc_deadline;              /* KVM's LAPIC has the deadline mode */
};

/* What KVM can offer, asked once a process: it does not change. Any thread; NULL with words on failure. */
const struct kvm_cpuid2 *cpuid_supported(int kvm_fd, struct error *err);

/* A table for KVM_SET_CPUID2, made from base; free() it. NULL with words on failure. */
struct kvm_cpuid2 *cpuid_build(const struct kvm_cpuid2 *base, const struct cpuid_request *rq,
	struct error *err);

/* The entry of a leaf, or NULL. */
struct kvm_cpuid_entry2 *cpuid_find(struct kvm_cpuid2 *t, uint32_t leaf, uint32_t sub);

/* features.c */
enum cpuid_reg { CPUID_EAX, CPUID_EBX, CPUID_ECX, CPUID_EDX };

struct cpu_feature {
	const char *name;               /* as /proc/cpuinfo has it */
	uint32_t leaf;
	uint8_t sub, reg, bit;
	const char *needs;              /* cleared with this one; stands earlier in the table */
};
extern const struct cpu_feature cpu_features[];         /* ends with a NULL name */
const struct cpu_feature *cpu_feature_find(const char *name, unsigned len);
/* Names a mistyped one may have meant, "a, b or c"; empty if none is near. */
void cpu_feature_near(const char *name, char *buf, unsigned len);

/* Walks a --cpu specification: *at starts as spec; returns false at the end. */
struct cpu_word {
	bool add;
	const struct cpu_feature *feature;
};
int cpu_spec_next(const char **at, struct cpu_word *w, struct error *err);     /* 1: a word; 0: end; -EINVAL */
#endif
