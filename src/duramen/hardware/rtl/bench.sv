// Feeds an engine with beats and activations from files, and writes down what it gives and how long it takes.
`timescale 1ns / 1ps
module bench #(
    parameter FACTOR = 4, TM = 8, TN = 8, TT = 2, BX = 6, SPACING = 10, SUM = 24, STEPS = 1, BW = 64, LOAD = 1, STREAMS = 0,
    parameter BEATS = 1, WORDS = 1  // of the memory outside, and of activations on the chip
);
    reg clk = 0, reset = 1;
    reg [31:0] nm, nk, nt, eights, load, store, limit, at;
    wire load_wants, result_valid, store_valid, finished;
    wire [31:0] place_k, place_t, result_m, result_t, cycles;
    wire [TM*TT*SUM-1:0] result;
    wire [BW-1:0] store_beat;
    reg [BW-1:0] beats[BEATS];
    reg [TN*TT*BX-1:0] activations[WORDS];
    engine #(.FACTOR(FACTOR), .TM(TM), .TN(TN), .TT(TT), .BX(BX), .SPACING(SPACING), .SUM(SUM), .STEPS(STEPS), .BW(BW), .LOAD(LOAD),
        .STREAMS(STREAMS)) dut (
        .clk(clk), .reset(reset), .nm(nm), .nk(nk), .nt(nt), .eights(eights), .load(load), .store(store), .load_wants(load_wants),
        .load_beat(beats[at]), .place_k(place_k), .place_t(place_t), .resident(activations[place_k*nt+place_t]), .result_valid(result_valid),
        .result_m(result_m), .result_t(result_t), .result(result), .store_valid(store_valid), .store_beat(store_beat), .finished(finished),
        .cycles(cycles));
    integer out, given;
    always #1 clk = !clk;
    always @(posedge clk) at <= reset ? 0 : at + 32'(load_wants);
    always @(posedge clk) begin
        if (!reset && result_valid) $fwrite(out, "r %0d %0d %h\n", result_m, result_t, result);
        if (!reset && store_valid) $fwrite(out, "s %h\n", store_beat);
        // When it has finished, the last sums are in their register for one more cycle.
        if (!reset && ((finished && !result_valid) || cycles > limit)) begin
            if (finished) $fwrite(out, "cycles %0d\n", cycles);
            $fclose(out);
            $finish;
        end
    end
    initial begin
        given = $value$plusargs("nm=%d", nm) + $value$plusargs("nk=%d", nk) + $value$plusargs("nt=%d", nt) + $value$plusargs("eights=%d", eights)
            + $value$plusargs("load=%d", load) + $value$plusargs("store=%d", store) + $value$plusargs("limit=%d", limit);
        if (given != 7) $fatal(1, "seven sizes are needed");
        out = $fopen("out.txt", "w");
        $readmemh("beats.hex", beats);
        $readmemh("activations.hex", activations);
        repeat (4) @(posedge clk);
        #1 reset = 0;
    end
endmodule
