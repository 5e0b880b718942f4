// Threads that meet: each piece of each step runs once, after those of the step before; an error ends the run of all.

void test_meetings() {
  constexpr int kSteps = 40, kPieces = 7, kThreads = 4;
  for (int throwing = -1; throwing < kSteps; throwing += 13) {
    Meetings meetings(kSteps);
    std::atomic<int> runs[kSteps] = {}, told{0};
    const auto work = [&](int late) {
      for (int i = 0; i < late; ++i) std::this_thread::yield();
      try {
        for (int step = 0; step < kSteps; ++step) {
          meetings.share(step, kPieces, [&](int64_t piece) {
            if (step > 0) expect(runs[step - 1] == kPieces, "a step of meeting threads began too early");
            ++runs[step];
            if (step == throwing && piece == 3) throw std::runtime_error("piece 3");
          });
        }
      } catch (const std::runtime_error& error) {
        expect(std::string(error.what()) == "piece 3", "meeting threads tell another error");
        ++told;
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i * 1000);
    for (std::thread& thread : threads) thread.join();
    expect(told == (throwing < 0 ? 0 : kThreads), "not all meeting threads tell of an error");
    for (int step = 0; step < kSteps; ++step) {
      const bool whole = throwing < 0 || step < throwing, none = throwing >= 0 && step > throwing;
      expect(!whole || runs[step] == kPieces, "pieces of a step ran more or less than once");
      expect(!none || runs[step] == 0, "a step ran after an error");
    }
  }
}
