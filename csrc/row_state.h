#pragma once
// Columns of the table of running requests, one int32 row of kRowStateWidth a request; floats are stored by their bits.
// nanoinfer/row_state.py owns the meaning; a test compares the two files.

namespace nanoinfer {

constexpr int kLastToken = 0;
constexpr int kLength = 1;
constexpr int kSeedLo = 2;
constexpr int kSeedHi = 3;
constexpr int kTemperature = 4;
constexpr int kTopK = 5;
constexpr int kTopP = 6;
constexpr int kMinP = 7;
constexpr int kRepetitionPenalty = 8;
constexpr int kPresencePenalty = 9;
constexpr int kFrequencyPenalty = 10;
constexpr int kPromptLength = 11;
constexpr int kRowStateWidth = 16;

constexpr int kFlagSample = 1;
constexpr int kFlagStore = 2;

}  // namespace nanoinfer
