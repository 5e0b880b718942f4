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

// Work that is waited for later: in between there is other work.
void test_meetings_in_halves() {
  constexpr int kLayers = 20, kPieces = 5, kThreads = 4;
  for (const bool throwing : {false, true}) {
    Meetings meetings(2 * kLayers);
    std::atomic<int> first[kLayers] = {}, second[kLayers] = {}, told{0};
    const auto work = [&] {
      try {
        for (int layer = 0; layer < kLayers; ++layer) {
          meetings.work(2 * layer, kPieces, [&](int64_t piece) {
            if (layer > 0) expect(second[layer - 1] == kPieces, "a layer began before the end of another");
            if (throwing && layer == 7 && piece == 2) throw std::runtime_error("piece 2");
            if (piece == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // others come early
            ++first[layer];
          });
          meetings.share(2 * layer + 1, kPieces, [&](int64_t) { ++second[layer]; });
          meetings.wait(2 * layer, kPieces);
          expect(first[layer] == kPieces, "a thread did not wait for the work of others");
        }
      } catch (const std::runtime_error&) {
        ++told;
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
    expect(told == (throwing ? kThreads : 0), "not all threads tell of an error in work that is waited for later");
    expect(throwing || second[kLayers - 1] == kPieces, "work that is waited for later is left undone");
  }
}
