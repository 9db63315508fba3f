#ifndef CLI_FAILURE_H
#define CLI_FAILURE_H
/* The report on a vCPU that KVM gave up on (status 105). Main thread. */
struct error;
struct spawner;
struct vm;

int  failure_prepare(struct spawner *s, struct error *err);    /* register the disassembler, where there is one */
void failure_report(struct vm *vm);                             /* registers, instructions, what it means; to stderr */
#endif
