#ifndef CLI_H
#define CLI_H
/* Subcommands: argv in, process status out. Main thread. */
int cli_main(int argc, char **argv);

int cmd_run(int argc, char **argv);
int cmd_disk(int argc, char **argv);
int cmd_doctor(int argc, char **argv);
#endif
