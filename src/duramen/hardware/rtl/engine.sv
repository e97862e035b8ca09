// An engine that multiplies a matrix, whose rows have four or eight bits, by the activations of some tokens; the hardware that duramen.hardware.fpga counts cycles of.
//
// Weights of a tile of TM lanes by TN inputs stay while tokens pass, TT at once. Two lanes are a pair: two rows of four bits, or the unsigned low and the signed high half of one row of eight.
// While a tile is multiplied the next one is loaded, and while a row of tiles is multiplied the sums of the one before are stored; beats of BW bits come and go by separate channels.
`timescale 1ns / 1ps

// One multiplier of 27 by 18 bits. FACTOR 4: two weights by two activations, whose products lie SPACING bits apart. FACTOR 2: two weights by one, 22 bits apart, to be summed as they are.
module packed_multiplier #(
    parameter FACTOR = 4, BX = 6, SPACING = 10
) (
    input clk,
    input eight,
    input [3:0] low,
    input [3:0] high,
    input signed [BX-1:0] first,
    input signed [BX-1:0] second,
    output reg signed [47:0] product
);
    wire signed [26:0] low_value = eight ? $signed({23'b0, low}) : $signed({{23{low[3]}}, low});
    wire signed [26:0] high_value = $signed({{23{high[3]}}, high});
    wire signed [26:0] first_value = 27'(first), second_value = 27'(second);
    reg signed [26:0] wide;
    reg signed [17:0] narrow;
    always @(posedge clk) begin
        if (FACTOR == 4) begin
            wide <= first_value + (second_value <<< (2 * SPACING));
            narrow <= 18'(low_value + (high_value <<< SPACING));
        end else begin
            wide <= low_value + (high_value <<< 22);
            narrow <= 18'(first_value);
        end
        product <= wide * narrow;
    end
endmodule

// The products of two lanes over TN inputs, summed: lane 0 and lane 1 of every token.
module lane_pair #(
    parameter FACTOR = 4, TN = 8, TT = 2, BX = 6, SPACING = 10, SUM = 24
) (
    input clk,
    input eight,
    input [8*TN-1:0] weights,
    input [TN*TT*BX-1:0] activations,
    output reg [2*TT*SUM-1:0] sums
);
    wire signed [47:0] products[TN];
    for (genvar k = 0; k < TN; k++) begin : input_of
        packed_multiplier #(.FACTOR(FACTOR), .BX(BX), .SPACING(SPACING)) unit (
            .clk(clk), .eight(eight), .low(weights[8*k+:4]), .high(weights[8*k+4+:4]),
            .first($signed(activations[BX*k+:BX])), .second($signed(activations[BX*(TN*(TT-1)+k)+:BX])), .product(products[k]));
    end
    // A field is its bits, and one more where the field below is negative.
    function automatic signed [SUM-1:0] field(input signed [47:0] word, input integer place, input integer bits);
        reg signed [47:0] moved;
        moved = (word <<< (48 - bits - place)) >>> (48 - bits);
        return SUM'(moved) + (place > 0 ? SUM'({1'b0, word[(place > 0) ? place - 1 : 0]}) : SUM'(0));
    endfunction
    always @(posedge clk) begin : tree
        reg signed [47:0] chain;
        reg signed [SUM-1:0] total;
        if (FACTOR == 4) begin
            for (int part = 0; part < 4; part++) begin
                total = 0;
                for (int k = 0; k < TN; k++) total = total + field(products[k], SPACING * part, SPACING);
                sums[SUM*part+:SUM] <= total;
            end
        end else begin
            chain = 0;
            for (int k = 0; k < TN; k++) chain = chain + products[k];
            sums[0+:SUM] <= field(chain, 0, 22);
            sums[SUM+:SUM] <= field(chain, 22, 26);
        end
    end
endmodule

module engine #(
    parameter FACTOR = 4, TM = 8, TN = 8, TT = 2, BX = 6, SPACING = 10, SUM = 24,
    parameter STEPS = 1,  // of TT tokens, at most
    parameter BW = 64, LOAD = 1,  // bits of a beat, and beats of a tile's load, at most
    parameter STREAMS = 0  // whether activations come with the weights, and sums go out
) (
    input clk,
    input reset,
    input [31:0] nm,  // of this product: rows and columns of tiles, steps of TT tokens
    input [31:0] nk,
    input [31:0] nt,
    input [31:0] eights,  // pairs that hold a row of eight bits; they come first
    input [31:0] load,  // beats of a tile's load
    input [31:0] store,  // beats of a row's store
    output load_wants,  // a beat is taken in this cycle
    input [BW-1:0] load_beat,
    output [31:0] place_k,  // the activations that are read in this cycle, if they are on the chip
    output [31:0] place_t,
    input [TN*TT*BX-1:0] resident,
    output reg result_valid,  // sums of a row of tiles as they are finished
    output reg [31:0] result_m,
    output reg [31:0] result_t,
    output reg [TM*TT*SUM-1:0] result,
    output store_valid,
    output [BW-1:0] store_beat,
    output finished,
    output reg [31:0] cycles
);
    localparam WEIGHTS = 4 * TM * TN, WORD = TN * TT * BX, SUMS = TM * TT * SUM;

    // Loading: into the half that no product uses.
    reg [LOAD*BW-1:0] buffers[2];
    reg [31:0] beat, loads, computes;
    assign load_wants = !reset && loads < nm * nk && (beat != 0 || loads - computes < 2);
    always @(posedge clk) begin
        if (reset) begin
            beat <= 0;
            loads <= 0;
        end else if (load_wants) begin
            buffers[loads[0]][beat*BW+:BW] <= load_beat;
            beat <= beat == load - 1 ? 0 : beat + 1;
            if (beat == load - 1) loads <= loads + 1;
        end
    end

    // Multiplying: a step of TT tokens in every cycle, tile after tile.
    reg [31:0] t, k, m, rows, stores;
    wire issue = !reset && m < nm && (t != 0 || (loads > computes && (k != 0 || m < 2 || stores >= m - 1)));
    assign place_k = k;
    assign place_t = t;
    wire [LOAD*BW-1:0] tile = buffers[computes[0]];
    wire [WORD-1:0] word;
    if (STREAMS != 0) begin : from_outside
        wire [STEPS*WORD-1:0] moved = (STEPS*WORD)'(tile >> WEIGHTS);
        assign word = moved[t*WORD+:WORD];
    end else begin : on_chip
        assign word = resident;
    end
    always @(posedge clk) begin
        if (reset) begin
            t <= 0;
            k <= 0;
            m <= 0;
            computes <= 0;
        end else if (issue) begin
            t <= t == nt - 1 ? 0 : t + 1;
            if (t == nt - 1) begin
                computes <= computes + 1;
                k <= k == nk - 1 ? 0 : k + 1;
                if (k == nk - 1) m <= m + 1;
            end
        end
    end
    wire [SUMS-1:0] found;
    for (genvar p = 0; p < TM / 2; p++) begin : pair_of
        lane_pair #(.FACTOR(FACTOR), .TN(TN), .TT(TT), .BX(BX), .SPACING(SPACING), .SUM(SUM)) pair (
            .clk(clk), .eight(m * (TM / 2) + p < eights), .weights(tile[8*TN*p+:8*TN]), .activations(word),
            .sums(found[2*TT*SUM*p+:2*TT*SUM]));
    end

    // What was issued reaches the sums after the operands, the product and the tree.
    localparam DEPTH = 3;
    reg [DEPTH-1:0] on_the_way;
    reg [31:0] late_t[DEPTH], late_k[DEPTH], late_m[DEPTH];
    always @(posedge clk) begin
        on_the_way <= reset ? 0 : {on_the_way[DEPTH-2:0], issue};
        late_t[0] <= t;
        late_k[0] <= k;
        late_m[0] <= m;
        for (int stage = 1; stage < DEPTH; stage++) begin
            late_t[stage] <= late_t[stage-1];
            late_k[stage] <= late_k[stage-1];
            late_m[stage] <= late_m[stage-1];
        end
    end
    wire [31:0] now_t = late_t[DEPTH-1], now_k = late_k[DEPTH-1], now_m = late_m[DEPTH-1];
    reg [SUMS-1:0] accumulators[2][STEPS];
    reg [SUMS-1:0] after;
    always @(posedge clk) begin
        result_valid <= 0;
        if (reset) rows <= 0;
        else if (on_the_way[DEPTH-1]) begin
            for (int lane = 0; lane < TM * TT; lane++)
                after[SUM*lane+:SUM] = found[SUM*lane+:SUM] + (now_k == 0 ? SUM'(0) : accumulators[now_m[0]][now_t][SUM*lane+:SUM]);
            accumulators[now_m[0]][now_t] <= after;
            result <= after;
            result_m <= now_m;
            result_t <= now_t;
            result_valid <= now_k == nk - 1;
            if (now_k == nk - 1 && now_t == nt - 1) rows <= rows + 1;
        end
    end

    // Storing: the sums of a row of tiles, token by token.
    if (STREAMS != 0) begin : stored
        localparam MOST = (STEPS * SUMS + BW - 1) / BW;
        reg [31:0] sent;
        wire [MOST*BW-1:0] row;
        for (genvar step = 0; step < STEPS; step++)
            for (genvar token = 0; token < TT; token++)
                for (genvar lane = 0; lane < TM; lane++)
                    assign row[SUM*((step*TT+token)*TM+lane)+:SUM] = accumulators[stores[0]][step][SUM*(2*TT*(lane/2)+lane%2+2*token)+:SUM];
        if (MOST * BW > STEPS * SUMS) assign row[MOST*BW-1:STEPS*SUMS] = 0;
        assign store_valid = !reset && stores < nm && (sent != 0 || rows > stores);
        assign store_beat = row[sent*BW+:BW];
        always @(posedge clk) begin
            if (reset) begin
                sent <= 0;
                stores <= 0;
            end else if (store_valid) begin
                sent <= sent == store - 1 ? 0 : sent + 1;
                if (sent == store - 1) stores <= stores + 1;
            end
        end
    end else begin : kept
        assign store_valid = 0;
        assign store_beat = 0;
        always @(*) stores = rows;
    end
    assign finished = stores == nm;
    always @(posedge clk) cycles <= reset ? 0 : cycles + !finished;
endmodule
