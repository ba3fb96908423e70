// self_test CASE [SCHEDULE]. Exits with 0 when the case returns, with 3 and the message when it throws a kernel's
// fault, with 1 on a failed check.
#include <cstdio>
#include <cstdlib>

#include "cases.h"

int main(int argc, char** argv) {
  using namespace self_test;
  Cases cases;
  for (Cases (*group)() : {correct_kernels, faulty_kernels, sanitized_faults, measurements})
    cases.merge(group());
  if (argc < 2 || !cases.count(argv[1])) {
    for (const auto& [name, run] : cases)
      std::puts(name.c_str());
    return 2;
  }
  if (argc > 2) emulator::set_schedule(std::strtoull(argv[2], nullptr, 0));
  try {
    cases[argv[1]]();
  } catch (const emulator::Error& error) {
    std::puts(error.what());
    return 3;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
