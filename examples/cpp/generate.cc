// Streams a completion with grpc++ and the stubs that protoc makes of the .proto files:
//   make serve                                                  # in one terminal
//   make -C examples/cpp                                        # in another
//   examples/cpp/build/generate 'def fibonacci(n):'
#include <getopt.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>

#include "carousel/v1/generation.grpc.pb.h"

namespace v1 = carousel::v1;

constexpr const char* kStatusNames[] = {  // by number; the library has no function for it
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

// Text on stdout as it comes, how it ended and what it took on stderr.
void show(const v1::GenerateResponse& response) {
  if (response.has_delta()) {
    std::cout << response.delta().text() << std::flush;
  } else if (response.has_finished()) {
    const std::string prefix = "FINISH_REASON_";
    std::cout << std::endl;
    std::cerr << "finish reason: " << v1::FinishReason_Name(response.finished().reason()).substr(prefix.size()) << std::endl;
  } else if (response.has_summary()) {
    const v1::Usage& usage = response.summary().usage();
    std::cerr << "usage: " << usage.prompt_tokens() << " prompt tokens, " << usage.output_tokens() << " output tokens"
              << std::endl;
  }
}

int main(int argc, char** argv) {
  std::string target = "127.0.0.1:50051";
  double timeout_s = 60;  // for all of it
  v1::GenerateRequest request;
  request.mutable_stopping()->set_max_tokens(64);
  const option options[] = {{"target", 1, nullptr, 't'}, {"max-tokens", 1, nullptr, 'm'}, {"seed", 1, nullptr, 's'},
                            {"timeout", 1, nullptr, 'd'}, {nullptr, 0, nullptr, 0}};
  for (int flag; (flag = getopt_long(argc, argv, "", options, nullptr)) != -1;) switch (flag) {
      case 't': target = optarg; break;
      case 'm': request.mutable_stopping()->set_max_tokens(std::strtoul(optarg, nullptr, 10)); break;
      case 's': request.mutable_sampling()->set_seed(std::strtoull(optarg, nullptr, 10)); break;
      case 'd': timeout_s = std::strtod(optarg, nullptr); break;
      default: std::cerr << "usage: generate [PROMPT] [--target T] [--max-tokens N] [--seed N] [--timeout S]\n"; return 2;
    }
  request.set_text(optind < argc ? argv[optind] : "def fibonacci(n):");

  grpc::ClientContext context;
  // The deadline goes to the server: it plans by it, refuses what can't be done in time, and computes nothing after it.
  const std::chrono::duration<double> timeout(timeout_s);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::nanoseconds>(timeout));

  // Ctrl-C is taken by a thread: a signal handler may not call the library.
  sigset_t interrupt;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  pthread_sigmask(SIG_BLOCK, &interrupt, nullptr);
  std::thread([&] {
    int signal;
    sigwait(&interrupt, &signal);
    context.TryCancel();  // the server stops computing at its next step
  }).detach();

  auto stub = v1::Generation::NewStub(grpc::CreateChannel(target, grpc::InsecureChannelCredentials()));
  auto reader = stub->Generate(&context, request);
  v1::GenerateResponse response;
  while (reader->Read(&response)) show(response);
  const grpc::Status status = reader->Finish();
  const bool is_cancelled = status.error_code() == grpc::StatusCode::CANCELLED;
  if (is_cancelled) std::cerr << "\ncancelled\n";
  else if (!status.ok()) std::cerr << target << ": " << kStatusNames[status.error_code()] << ": " << status.error_message() << "\n";
  std::_Exit(status.ok() ? 0 : is_cancelled ? 130 : 1);  // past the thread, which waits on
}
